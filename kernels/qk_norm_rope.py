"""qk_norm_rope: RMSNorm of q and k per head, rotary, written straight into the joint [img, txt] buffers of attention.

Letters: B batch, Li image tokens, Lt text tokens, S = Li + Lt, H heads, Dh channels of a head, R rotated rows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.extension import core
from uniworld.kernels.registry import DTYPE_CODES, Op, backend_for, channels_last, register, triton_build, uses_cpp

ROWS_PER_PROGRAM = 16  # tokens of one partial sum in the backward pass
HEADS_PER_PROGRAM = 8


def qk_norm_rope(
    img_qkv: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_qkv: Tensor | None = None,
    txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of joint attention from the fused projections of one or two streams.

    Args:
        img_qkv: [B, Li, 3 * H * Dh], fp32 or bf16 (other types take the reference), q then k then v; rows may be
            strided. Without a text stream it is the joint sequence itself, as in FLUX's single blocks.
        img_q_weight, img_k_weight: [Dh], weights of the RMSNorms.
        cos, sin: [R, Dh / 2], fp32; row i rotates the channel pairs (2j, 2j + 1) of token i. R <= Li: later rows are
            text and are not rotated.
        txt_qkv, txt_q_weight, txt_k_weight: the same for the text stream, [B, Lt, 3 * H * Dh] and [Dh]; its rows
            follow the image's.
        num_heads: H.
        eps: added to the mean square.

    Returns: q, k, v, each [B, S, H, Dh], dtype of img_qkv. Norm and rotation are fp32. With one stream and no
        gradients asked for, v is a view of img_qkv.

    Raises:
        ValueError: a shape, a dtype or a device does not fit.
    """
    _check(img_qkv, img_q_weight, img_k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight, num_heads)
    arguments = (img_qkv, img_q_weight, img_k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight)
    if backend_for(img_qkv, cpp="qk_norm_rope") == "torch":
        return qk_norm_rope_reference(*arguments, num_heads=num_heads, eps=eps)
    # A view's gradient would cost a zero-filled tensor and a sum of all of qkv: three times the copy made instead.
    copy_v = txt_qkv is not None or (torch.is_grad_enabled() and img_qkv.requires_grad)
    q, k, v = _forward_op(*arguments, num_heads, eps, copy_v)
    if not copy_v:
        B, L, width = img_qkv.shape
        v = img_qkv[..., width // 3 * 2 :].view(B, L, num_heads, -1)
    return q, k, v


def qk_norm_rope_reference(
    img_qkv: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_qkv: Tensor | None = None,
    txt_q_weight: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """As diffusers' FLUX: RMSNorm in the input's type, then the rotation in the table's."""

    def normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> list[Tensor]:
        q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in qkv.chunk(3, dim=-1))
        q = F.rms_norm(q, q.shape[-1:], q_weight.to(q.dtype), eps)
        return [q, F.rms_norm(k, k.shape[-1:], k_weight.to(k.dtype), eps), v]

    q, k, v = normed(img_qkv, img_q_weight, img_k_weight)
    if txt_qkv is not None:
        txt = normed(txt_qkv, txt_q_weight, txt_k_weight)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), txt))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, kept = x.split([cos.shape[0], x.shape[1] - cos.shape[0]], dim=1)
    cos, sin = cos[:, None], sin[:, None]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), kept), dim=1)


def _check(img_qkv, img_q_weight, img_k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight, num_heads) -> None:
    if img_qkv.ndim != 3 or img_qkv.shape[2] % (6 * num_heads):
        allowed = f"[batch, tokens, 3 * num_heads * even head size], num_heads={num_heads}"
        raise ValueError(f"img_qkv={tuple(img_qkv.shape)}: must be {allowed}")
    B, Li, width = img_qkv.shape
    head = width // (3 * num_heads)
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != head // 2 or cos.shape[0] > Li:
        allowed = f"[rows <= {Li}, {head // 2}]"
        raise ValueError(f"cos={tuple(cos.shape)}, sin={tuple(sin.shape)}: both must be {allowed}")
    weights = {"img_q_weight": img_q_weight, "img_k_weight": img_k_weight}
    if txt_qkv is not None:
        weights |= {"txt_q_weight": txt_q_weight, "txt_k_weight": txt_k_weight}
        if txt_qkv.ndim != 3 or (txt_qkv.shape[0], txt_qkv.shape[2]) != (B, width) or txt_qkv.dtype != img_qkv.dtype:
            allowed = f"({B}, tokens, {width}) {img_qkv.dtype} as img_qkv"
            raise ValueError(f"txt_qkv={tuple(txt_qkv.shape)} {txt_qkv.dtype}: must be {allowed}")
    for name, tensor in {**weights, "cos": cos, "sin": sin, "txt_qkv": txt_qkv}.items():
        if tensor is not None and tensor.device != img_qkv.device:
            raise ValueError(f"{name}.device={tensor.device}: must be {img_qkv.device} as img_qkv")
    for name, weight in weights.items():
        if weight is None or tuple(weight.shape) != (head,):
            raise ValueError(f"{name}={None if weight is None else tuple(weight.shape)}: must be ({head},)")


@triton.jit
def _norm_rope(x, weight, cos, sin, EPS: tl.constexpr, DH: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm and rotation of one token's heads, [BLOCK_H, 2 * HALF]; columns from DH on are zero."""
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / DH + EPS)
    even, odd = tl.split(tl.reshape(x * rstd[:, None] * weight[None, :], (BLOCK_H, HALF, 2)))
    pairs = tl.join(even * cos[None, :] - odd * sin[None, :], odd * cos[None, :] + even * sin[None, :])
    return tl.reshape(pairs, (BLOCK_H, 2 * HALF))


@triton.jit
def _forward_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    batch_stride, row_stride, L, S, OFFSET, R,
    H: tl.constexpr, DH: tl.constexpr, EPS: tl.constexpr, COPY_V: tl.constexpr,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    sample, token = (tl.program_id(0) // L).to(tl.int64), (tl.program_id(0) % L).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    col, pair = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    mask = (head < H)[:, None] & (col < DH)[None, :]
    at = head[:, None] * DH + col[None, :]
    source = sample * batch_stride + token * row_stride
    target = (sample * S + OFFSET + token) * (H * DH)
    rotated = (token < R) & (pair < DH // 2)
    cos = tl.load(cos_ptr + token * (DH // 2) + pair, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + token * (DH // 2) + pair, mask=rotated, other=0.0)
    q_weight = tl.load(q_weight_ptr + col, mask=col < DH, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + col, mask=col < DH, other=0.0).to(tl.float32)
    q = tl.load(qkv_ptr + source + at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv_ptr + source + H * DH + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(q_ptr + target + at, _norm_rope(q, q_weight, cos, sin, EPS, DH, BLOCK_H, HALF), mask=mask)
    tl.store(k_ptr + target + at, _norm_rope(k, k_weight, cos, sin, EPS, DH, BLOCK_H, HALF), mask=mask)
    if COPY_V:
        v = tl.load(qkv_ptr + source + 2 * H * DH + at, mask=mask, other=0.0)
        tl.store(v_ptr + target + at, v, mask=mask)


@triton.jit
def _norm_rope_backward(
    dy, x, weight, cos, sin, EPS: tl.constexpr, DH: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Gradients of `_norm_rope` with respect to x and, summed over the heads, to the weight."""
    even, odd = tl.split(tl.reshape(dy, (BLOCK_H, HALF, 2)))
    pairs = tl.join(even * cos[None, :] + odd * sin[None, :], odd * cos[None, :] - even * sin[None, :])
    d = tl.reshape(pairs, (BLOCK_H, 2 * HALF))
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / DH + EPS)
    normed = x * rstd[:, None]
    g = d * weight[None, :]
    dx = rstd[:, None] * (g - normed * (tl.sum(g * normed, axis=1) / DH)[:, None])
    return dx, tl.sum(d * normed, axis=0)


@triton.jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    dqkv_ptr, dq_weight_ptr, dk_weight_ptr, batch_stride, row_stride, L, S, OFFSET, R,
    H: tl.constexpr, DH: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, ROWS)
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    col, pair = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    mask = (head < H)[:, None] & (col < DH)[None, :]
    at = head[:, None] * DH + col[None, :]
    q_weight = tl.load(q_weight_ptr + col, mask=col < DH, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + col, mask=col < DH, other=0.0).to(tl.float32)
    dq_weight = tl.zeros((2 * HALF,), tl.float32)
    dk_weight = tl.zeros((2 * HALF,), tl.float32)
    for token in range(block * ROWS, min((block + 1) * ROWS, L)):
        rotated = (token < R) & (pair < DH // 2)
        cos = tl.load(cos_ptr + token * (DH // 2) + pair, mask=rotated, other=1.0)
        sin = tl.load(sin_ptr + token * (DH // 2) + pair, mask=rotated, other=0.0)
        joint = (sample * S + OFFSET + token) * (H * DH)
        source = sample * batch_stride + token * row_stride
        target = (sample * L + token) * (3 * H * DH)
        dq = tl.load(dq_ptr + joint + at, mask=mask, other=0.0).to(tl.float32)
        q = tl.load(qkv_ptr + source + at, mask=mask, other=0.0).to(tl.float32)
        dx, dw = _norm_rope_backward(dq, q, q_weight, cos, sin, EPS, DH, BLOCK_H, HALF)
        tl.store(dqkv_ptr + target + at, dx, mask=mask)
        dq_weight += dw
        dk = tl.load(dk_ptr + joint + at, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(qkv_ptr + source + H * DH + at, mask=mask, other=0.0).to(tl.float32)
        dx, dw = _norm_rope_backward(dk, k, k_weight, cos, sin, EPS, DH, BLOCK_H, HALF)
        tl.store(dqkv_ptr + target + H * DH + at, dx, mask=mask)
        dk_weight += dw
        dv = tl.load(dv_ptr + joint + at, mask=mask, other=0.0)
        tl.store(dqkv_ptr + target + 2 * H * DH + at, dv, mask=mask)
    out = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * DH + col
    tl.store(dq_weight_ptr + out, dq_weight, mask=col < DH)
    tl.store(dk_weight_ptr + out, dk_weight, mask=col < DH)


def _tiles(num_heads: int, head: int) -> dict[str, int]:
    block_h = min(HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    return {"BLOCK_H": block_h, "HALF": triton.next_power_of_2(head // 2)}


def _write_stream(qkv, q_weight, k_weight, cos, sin, q, k, v, offset, eps) -> None:
    """Norm, rotate and copy one stream into its rows of the joint buffers; `v` None leaves the values alone."""
    qkv = channels_last(qkv)
    B, L, _ = qkv.shape
    S, H, Dh = q.shape[1:]
    if qkv.numel() == 0:
        return
    if uses_cpp(qkv, "qk_norm_rope"):
        q_weight, k_weight = q_weight.float().contiguous(), k_weight.float().contiguous()
        core().qk_norm_rope(
            DTYPE_CODES[qkv.dtype], qkv.data_ptr(), qkv.stride(0), qkv.stride(1), q_weight.data_ptr(),
            k_weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0], q.data_ptr(), k.data_ptr(),
            0 if v is None else v.data_ptr(), B, L, S, offset, H, Dh, eps,
        )  # fmt: skip
        return
    tiles = _tiles(H, Dh)
    _forward_kernel[(B * L, triton.cdiv(H, tiles["BLOCK_H"]))](
        qkv, q_weight.contiguous(), k_weight.contiguous(), cos, sin, q, k, q if v is None else v,
        qkv.stride(0), qkv.stride(1), L, S, offset, cos.shape[0],
        H=H, DH=Dh, EPS=eps, COPY_V=v is not None, **tiles, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("uniworld::qk_norm_rope", mutates_args=())
def _forward_op(
    img_qkv: Tensor, img_q_weight: Tensor, img_k_weight: Tensor, cos: Tensor, sin: Tensor, txt_qkv: Tensor | None,
    txt_q_weight: Tensor | None, txt_k_weight: Tensor | None, num_heads: int, eps: float, copy_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _joint_buffers(img_qkv, txt_qkv, num_heads, copy_v)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    values = v if copy_v else None
    _write_stream(img_qkv, img_q_weight, img_k_weight, cos, sin, q, k, values, 0, eps)
    if txt_qkv is not None:
        Li = img_qkv.shape[1]
        _write_stream(txt_qkv, txt_q_weight, txt_k_weight, cos[:0], sin[:0], q, k, values, Li, eps)
    return q, k, v


def _joint_buffers(img_qkv: Tensor, txt_qkv: Tensor | None, num_heads: int, copy_v: bool):
    B, L, width = img_qkv.shape
    S = L if txt_qkv is None else L + txt_qkv.shape[1]
    shape = (B, S, num_heads, width // (3 * num_heads))
    return img_qkv.new_empty(shape), img_qkv.new_empty(shape), img_qkv.new_empty(shape if copy_v else (0,))


@_forward_op.register_fake
def _(img_qkv, img_q_weight, img_k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight, num_heads, eps, copy_v):
    return _joint_buffers(img_qkv, txt_qkv, num_heads, copy_v)


@torch.library.custom_op("uniworld::qk_norm_rope_backward", mutates_args=())
def _backward_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    offset: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of one stream, whose rows start at `offset` of the joint ones."""
    dq, dk, dv, qkv = dq.contiguous(), dk.contiguous(), dv.contiguous(), channels_last(qkv)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    B, L, width = qkv.shape
    S, H, Dh = dq.shape[1:]
    tiles = _tiles(H, Dh)
    grid = (B * triton.cdiv(L, ROWS_PER_PROGRAM), triton.cdiv(H, tiles["BLOCK_H"]))
    dqkv = qkv.new_empty(B, L, width)
    cpp = qkv.numel() > 0 and uses_cpp(qkv, "qk_norm_rope_backward")
    # Partial sums and no atomics: the same bits every run.
    dq_weight, dk_weight = (qkv.new_empty(grid[0], 1 if cpp else grid[1], Dh, dtype=torch.float32) for _ in range(2))
    if cpp:
        q_float, k_float = q_weight.float().contiguous(), k_weight.float().contiguous()
        core().qk_norm_rope_backward(
            DTYPE_CODES[qkv.dtype], dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), qkv.data_ptr(), qkv.stride(0),
            qkv.stride(1), q_float.data_ptr(), k_float.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[0],
            dqkv.data_ptr(), dq_weight.data_ptr(), dk_weight.data_ptr(), B, L, S, offset, H, Dh, ROWS_PER_PROGRAM, eps,
        )  # fmt: skip
    elif qkv.numel():
        _backward_kernel[grid](
            dq, dk, dv, qkv, q_weight.contiguous(), k_weight.contiguous(), cos, sin, dqkv, dq_weight, dk_weight,
            qkv.stride(0), qkv.stride(1), L, S, offset, cos.shape[0],
            H=H, DH=Dh, EPS=eps, ROWS=ROWS_PER_PROGRAM, **tiles, num_warps=4,
        )  # fmt: skip
    sums = (dq_weight.sum((0, 1)).to(q_weight.dtype), dk_weight.sum((0, 1)).to(k_weight.dtype))
    return dqkv, *sums


@_backward_op.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, offset, eps):
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.eps, copy_v = inputs
    if not copy_v:
        ctx.mark_non_differentiable(output[2])
    ctx.copy_v = copy_v
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, dq, dk, dv):
    img_qkv, img_q_weight, img_k_weight, cos, sin, txt_qkv, txt_q_weight, txt_k_weight = ctx.saved_tensors
    if not ctx.copy_v:  # only norm weights ask for gradients, and what img_qkv gets is dropped
        dv = torch.zeros_like(dq)
    img = _backward_op(dq, dk, dv, img_qkv, img_q_weight, img_k_weight, cos, sin, 0, ctx.eps)
    txt = (None, None, None)
    if txt_qkv is not None:
        Li = img_qkv.shape[1]
        txt = _backward_op(dq, dk, dv, txt_qkv, txt_q_weight, txt_k_weight, cos[:0], sin[:0], Li, ctx.eps)
    return *img, None, None, *txt, None, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _make_inputs(B, Li, Lt, R, H, Dh, dtype, device):
    def stream(L, strided):
        row = torch.randn(B, L, 3 * H * Dh + strided, dtype=dtype, device=device)
        weights = (torch.rand(Dh, dtype=dtype, device=device) + 0.5 for _ in range(2))
        return row[..., : 3 * H * Dh], *weights

    angle = torch.randn(R, Dh // 2, device=device) * 3
    inputs = dict(zip(("img_qkv", "img_q_weight", "img_k_weight"), stream(Li, strided=H * Dh)))
    inputs |= {"cos": angle.cos(), "sin": angle.sin(), "num_heads": H}
    if Lt:
        inputs |= dict(zip(("txt_qkv", "txt_q_weight", "txt_k_weight"), stream(Lt, strided=0)))
    return inputs


def _builds(element):
    sizes = {"H": 24, "DH": 128, "EPS": 1e-6} | _tiles(24, 128)
    tables = ("cos_ptr", "sin_ptr", "dq_weight_ptr", "dk_weight_ptr")
    return (
        *(triton_build(_forward_kernel, {**sizes, "COPY_V": c}, element=element, fp32=tables) for c in (True, False)),
        triton_build(_backward_kernel, {**sizes, "ROWS": ROWS_PER_PROGRAM}, element=element, fp32=tables),
    )


def _bytes_moved(case):
    """Of a forward pass without gradients, which leaves the values of a single stream where they are."""
    parts = 3 if case["Lt"] else 2
    return 2 * 2 * parts * case["B"] * (case["Li"] + case["Lt"]) * case["H"] * case["Dh"]


register(
    Op(
        name="qk_norm_rope",
        fn=qk_norm_rope,
        reference=qk_norm_rope_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "Li": 1, "Lt": 0, "R": 1, "H": 1, "Dh": 16},
            {"B": 2, "Li": 19, "Lt": 0, "R": 11, "H": 3, "Dh": 128},
            {"B": 1, "Li": 5, "Lt": 3, "R": 0, "H": 9, "Dh": 40},
            {"B": 2, "Li": 18, "Lt": 17, "R": 18, "H": 3, "Dh": 16},
        ),
        bench_cases=(
            {"B": 1, "Li": 4096, "Lt": 512, "R": 4096, "H": 24, "Dh": 128},
            {"B": 1, "Li": 4608, "Lt": 0, "R": 4096, "H": 24, "Dh": 128},
        ),
        bytes_moved=_bytes_moved,
        differentiable=("img_qkv", "img_q_weight", "img_k_weight", "txt_qkv", "txt_q_weight", "txt_k_weight"),
        triton_builds=_builds("*bf16") + _builds("*fp32"),
        cpp="qk_norm_rope",
    )
)
