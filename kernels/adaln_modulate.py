"""adaln_modulate: LayerNorm without affine, then (1 + scale) * x + shift, in one pass.

Letters: B batch, L tokens, D channels.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.extension import core
from uniworld.kernels.registry import DTYPE_CODES, Op, backend_for, channels_last, register, triton_build, uses_cpp

ROWS_PER_PROGRAM = 16  # tokens of one partial sum in the backward pass


def adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalize each token of `x` over D, then modulate it per sample.

    Args:
        x: [B, L, D], fp32 or bf16 (other types take the reference).
        scale, shift: [B, D], dtype of x; rows may be strided, as views into a table of all modulations are.
        eps: added to the variance.

    Returns: [B, L, D], dtype of x; statistics and arithmetic are fp32.

    Raises:
        ValueError: a shape, a dtype or a device does not fit x.
    """
    check_modulation(x, scale=scale, shift=shift)
    if backend_for(x, cpp="adaln_modulate") == "torch":
        return adaln_modulate_reference(x, scale, shift, eps)
    return _forward_op(x, scale, shift, eps)[0]


def adaln_modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def check_modulation(x: Tensor, **vectors: Tensor) -> None:
    """Refuse per-sample vectors that are not [B, D] of x's dtype and device."""
    if x.ndim != 3:
        raise ValueError(f"x={tuple(x.shape)}: must be [batch, tokens, channels]")
    expected = (x.shape[0], x.shape[2])
    for name, vector in vectors.items():
        if tuple(vector.shape) != expected:
            raise ValueError(f"{name}={tuple(vector.shape)}: must be {expected} for x of {tuple(x.shape)}")
        if vector.dtype != x.dtype or vector.device != x.device:
            raise ValueError(f"{name}: {vector.dtype} on {vector.device}, must be {x.dtype} on {x.device} as x")


@triton.jit
def normalize_row(x, mask, D: tl.constexpr, EPS: tl.constexpr):
    """Layer norm of one row in fp32, zero outside `mask`: (normalized, mean, 1 / standard deviation)."""
    mean = tl.sum(x, axis=0) / D
    centered = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / D + EPS)
    return centered * rstd, mean, rstd


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, scale_stride, shift_stride, L,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: B * L * D can pass 2**31
    sample = row // L
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + cols, mask=mask, other=0.0).to(tl.float32)
    normed, mean, rstd = normalize_row(x, mask, D, EPS)
    tl.store(y_ptr + row * D + cols, normed * (1.0 + scale) + shift, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr, scale_stride, L,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    scale = tl.load(scale_ptr + sample * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(block * ROWS, min((block + 1) * ROWS, L)):
        row = sample * L + token
        dy = tl.load(dy_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        g = dy * (1.0 + scale)
        dx = rstd * (g - tl.sum(g, axis=0) / D - normed * (tl.sum(g * normed, axis=0) / D))
        tl.store(dx_ptr + row * D + cols, dx, mask=mask)
        dscale += dy * normed
        dshift += dy
    out = (sample * tl.num_programs(1) + block) * D
    tl.store(dscale_ptr + out + cols, dscale, mask=mask)
    tl.store(dshift_ptr + out + cols, dshift, mask=mask)


@torch.library.custom_op("uniworld::adaln_modulate", mutates_args=())
def _forward_op(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, shift = x.contiguous(), channels_last(scale), channels_last(shift)
    B, L, D = x.shape
    y = torch.empty_like(x)
    mean, rstd = x.new_empty(B, L, dtype=torch.float32), x.new_empty(B, L, dtype=torch.float32)
    if x.numel() == 0:
        return y, mean, rstd
    if uses_cpp(x, "adaln_modulate"):
        core().adaln_modulate(
            DTYPE_CODES[x.dtype], x.data_ptr(), scale.data_ptr(), scale.stride(0), shift.data_ptr(), shift.stride(0),
            y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), B, L, D, eps,
        )  # fmt: skip
        return y, mean, rstd
    _forward_kernel[(B * L,)](
        x, scale, shift, y, mean, rstd, scale.stride(0), shift.stride(0), L,
        D=D, EPS=eps, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
    )  # fmt: skip
    return y, mean, rstd


@_forward_op.register_fake
def _(x, scale, shift, eps):
    stats = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats, torch.empty_like(stats)


@torch.library.custom_op("uniworld::adaln_modulate_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, scale = dy.contiguous(), x.contiguous(), channels_last(scale)
    B, L, D = x.shape
    blocks = triton.cdiv(L, ROWS_PER_PROGRAM)
    dx = torch.empty_like(x)
    # Partial sums and no atomics: the same bits every run.
    dscale, dshift = (x.new_empty(B, blocks, D, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        pass
    elif uses_cpp(x, "adaln_modulate_backward"):
        core().adaln_modulate_backward(
            DTYPE_CODES[x.dtype], dy.data_ptr(), x.data_ptr(), scale.data_ptr(), scale.stride(0), mean.data_ptr(),
            rstd.data_ptr(), dx.data_ptr(), dscale.data_ptr(), dshift.data_ptr(), B, L, D, ROWS_PER_PROGRAM,
        )  # fmt: skip
    else:
        _backward_kernel[(B, blocks)](
            dy, x, scale, mean, rstd, dx, dscale, dshift, scale.stride(0), L,
            D=D, ROWS=ROWS_PER_PROGRAM, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
        )  # fmt: skip
    return dx, dscale.sum(1).to(scale.dtype), dshift.sum(1).to(scale.dtype)


@_backward_op.register_fake
def _(dy, x, scale, mean, rstd):
    B, _, D = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale.new_empty(B, D), scale.new_empty(B, D)


def _setup_context(ctx, inputs, output):
    x, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)


def _autograd_backward(ctx, dy, _dmean, _drstd):
    return *_backward_op(dy, *ctx.saved_tensors), None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _make_inputs(B, L, D, dtype, device):
    table = torch.randn(B, 3, D, dtype=dtype, device=device)  # modulations are rows of a bigger table
    x = torch.randn(B, L, D, dtype=dtype, device=device) + 0.5
    return {"x": x, "scale": table[:, 2], "shift": table[:, 0]}


def _builds(element):
    sizes = {"D": 3072, "BLOCK_D": 4096}
    sums = ("mean_ptr", "rstd_ptr", "dscale_ptr", "dshift_ptr")
    options = {"element": element, "fp32": sums, "num_warps": 8}
    return (
        triton_build(_forward_kernel, {**sizes, "EPS": 1e-6}, **options),
        triton_build(_backward_kernel, {**sizes, "ROWS": ROWS_PER_PROGRAM}, **options),
    )


register(
    Op(
        name="adaln_modulate",
        fn=adaln_modulate,
        reference=adaln_modulate_reference,
        make_inputs=_make_inputs,
        cases=({"B": 1, "L": 1, "D": 64}, {"B": 3, "L": 16, "D": 130}, {"B": 2, "L": 37, "D": 96}),
        bench_cases=({"B": 1, "L": 4608, "D": 3072},),
        bytes_moved=lambda c: 2 * 2 * c["B"] * c["L"] * c["D"],
        differentiable=("x", "scale", "shift"),
        triton_builds=_builds("*bf16") + _builds("*fp32"),
        cpp="adaln_modulate",
    )
)
