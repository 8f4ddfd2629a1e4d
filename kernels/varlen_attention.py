"""varlen_attention: attention over the valid prefix of each sample, in Triton; lengths are read on the device.

It needs no library and no host sync when lengths change (a captured CUDA graph can replay with other lengths), but has
no backward pass. joint_attention's "triton" backend is this op.

Letters: B batch, S tokens, H heads, Dh head channels.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniworld.kernels.registry import INTERPRET, Op, TritonBuild, backend_for, register, triton_build

LOG2_E = 1.4426950408889634
# (BLOCK_M, BLOCK_N, num_warps, num_stages). At Dh = 128 they compile without register spills where they are used; their
# speed has not been measured on a GPU.
TILES = {80: (128, 32, 8, 3), 90: (128, 64, 8, 3)}
FLOAT32_TILE = (32, 32, 4, 1)  # spills: fp32 is for checking, not for speed
INTERPRETER_TILE = (32, 32, 4, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over the first `lengths[b]` tokens of each sample; the other rows come out zero.

    Args:
        q, k, v: [B, S, H, Dh], last dimension contiguous, any other strides.
        lengths: [B] int32 on the device of q, each in 1..S (not checked: that would need a host sync).

    Returns: [B, S, H, Dh], dtype of q; softmax and accumulation are fp32. No gradient.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"k, v={tuple(k.shape)}, {tuple(v.shape)}: must equal q, {tuple(q.shape)} {q.dtype}")
    if lengths.shape != (q.shape[0],) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths={tuple(lengths.shape)} {lengths.dtype}: must be {(q.shape[0],)} torch.int32")
    if backend_for(q) == "torch":
        return varlen_attention_reference(q, k, v, lengths)
    return _forward_op(q, k, v, lengths)


def varlen_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    valid = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v).masked_fill(~valid[:, :, None, None], 0)


@triton.jit
def _attend_block(q, acc, row_max, row_sum, k_ptrs, v_ptrs, key, length, dim_mask, SCALE: tl.constexpr,
                  MASKED: tl.constexpr, UPCAST: tl.constexpr, EVEN_D: tl.constexpr):
    """One block of keys of the online softmax; MASKED where the block reaches past the length."""
    if MASKED:
        load_mask = (key < length)[:, None] & dim_mask[None, :]
        k = tl.load(k_ptrs, mask=load_mask, other=0.0)
        v = tl.load(v_ptrs, mask=load_mask, other=0.0)
    elif EVEN_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=dim_mask[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=dim_mask[None, :], other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    if MASKED:
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _forward_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, y_ptr, S, H, Dh, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
                    SCALE: tl.constexpr, UPCAST: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_M queries of one head. SCALE includes log2(e): the softmax runs in base 2."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    dim_mask = dim < Dh
    length = tl.load(lengths_ptr + b)
    y_ptrs = y_ptr + (b * S + row[:, None]) * H * Dh + h * Dh + dim[None, :]
    y_mask = (row < S)[:, None] & dim_mask[None, :]
    if tl.program_id(0) * BLOCK_M >= length:  # only padding
        tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_D), y_ptr.dtype.element_ty), mask=y_mask)
    else:
        q_mask = (row < length)[:, None] & dim_mask[None, :]
        q = tl.load(q_ptr + b * q_b + h * q_h + row.to(tl.int64)[:, None] * q_s + dim[None, :], mask=q_mask, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        key = tl.arange(0, BLOCK_N)
        k_ptr += b * k_b + h * k_h  # 64-bit scalars advance, 32-bit offsets within a block stay: fewer registers
        v_ptr += b * v_b + h * v_h
        k_offsets = key[:, None] * k_s + dim[None, :]
        v_offsets = key[:, None] * v_s + dim[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        whole = length // BLOCK_N * BLOCK_N
        for _ in range(0, whole, BLOCK_N):
            acc, row_max, row_sum = _attend_block(q, acc, row_max, row_sum, k_ptr + k_offsets, v_ptr + v_offsets, key,
                                                  length, dim_mask, SCALE, False, UPCAST, EVEN_D)  # fmt: skip
            k_ptr += BLOCK_N * k_s
            v_ptr += BLOCK_N * v_s
        if whole < length:
            acc, row_max, row_sum = _attend_block(q, acc, row_max, row_sum, k_ptr + k_offsets, v_ptr + v_offsets,
                                                  whole + key, length, dim_mask, SCALE, True, UPCAST, EVEN_D)
        y = tl.where((row < length)[:, None], acc / row_sum[:, None], 0.0)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


def _tile_for(q: Tensor) -> tuple[int, int, int, int]:
    if not q.is_cuda:
        return INTERPRETER_TILE
    if q.dtype == torch.float32:
        return FLOAT32_TILE
    return TILES[90 if torch.cuda.get_device_capability(q.device)[0] == 9 else 80]


@torch.library.custom_op("uniworld::varlen_attention", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    if backend_for(q) == "torch":
        return varlen_attention_reference(q, k, v, lengths)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    B, S, H, Dh = q.shape
    y = q.new_empty(B, S, H, Dh)
    block_m, block_n, num_warps, num_stages = _tile_for(q)
    block_d = max(16, triton.next_power_of_2(Dh))
    _forward_kernel[(triton.cdiv(S, block_m), B * H)](
        q, k, v, lengths, y, S, H, Dh, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], SCALE=Dh**-0.5 * LOG2_E,
        UPCAST=INTERPRET, EVEN_D=block_d == Dh, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y


@_forward_op.register_fake
def _(q, k, v, lengths):
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.uniworld.varlen_attention)
def _(q_shape, *args, **kwargs) -> int:
    """For `torch.utils.flop_counter`: both products over all S tokens, as if nothing were padding."""
    B, S, H, Dh = q_shape
    return 4 * B * H * S * S * Dh


def _make_inputs(B, S, H, Dh, ragged, dtype, device):
    """q, k, v as views of one [B, S, 3, H, Dh] projection; `ragged` shortens each sample by that much more."""
    q, k, v = torch.randn(B, S, 3, H, Dh, dtype=dtype, device=device).unbind(2)
    lengths = torch.tensor([S - b * ragged for b in range(B)], dtype=torch.int32, device=device)
    return {"q": q, "k": k, "v": v, "lengths": lengths}


def _build(capability: int) -> TritonBuild:
    block_m, block_n, num_warps, num_stages = TILES[capability]
    constexprs = {"SCALE": 128**-0.5 * LOG2_E, "UPCAST": False, "EVEN_D": True, "BLOCK_M": block_m,
                  "BLOCK_N": block_n, "BLOCK_D": 128}  # fmt: skip
    build = triton_build(_forward_kernel, constexprs, num_warps=num_warps, num_stages=num_stages)
    return replace(build, signature=build.signature | {"lengths_ptr": "*i32"}, capabilities=(capability,))


register(
    Op(
        name="varlen_attention",
        fn=varlen_attention,
        reference=varlen_attention_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "S": 1, "H": 1, "Dh": 16, "ragged": 0},
            {"B": 1, "S": 64, "H": 2, "Dh": 32, "ragged": 0},
            {"B": 3, "S": 77, "H": 2, "Dh": 40, "ragged": 33},
        ),
        bench_cases=(
            {"B": 1, "S": 4608, "H": 24, "Dh": 128, "ragged": 0},
            {"B": 4, "S": 2624, "H": 24, "Dh": 128, "ragged": 320},
        ),
        bytes_moved=lambda c: 2 * c["H"] * c["Dh"] * sum(4 * c["S"] - 3 * b * c["ragged"] for b in range(c["B"])),
        flops=lambda c: sum(4 * c["H"] * (c["S"] - b * c["ragged"]) ** 2 * c["Dh"] for b in range(c["B"])),
        triton_builds=tuple(_build(capability) for capability in TILES),
    )
)
