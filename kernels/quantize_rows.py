"""quantize_rows: rows in e4m3 with one scale each, of a tensor, of the GELU of a tensor, or of the two side by side.

Letters: B batch, L tokens, D channels of x, G channels of gelu_of, C = D + G.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.linear_epilogue import gelu_tanh
from uniworld.kernels.registry import INTERPRET, Op, TritonBuild, backend_for, channels_last, register, triton_build

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_ROW_MAX = 1e-12  # a row of zeros gets a finite scale
FP8_CAPABILITIES = (90,)  # of ahead-of-time builds: sm_80 has no e4m3, sm_89 and newer do


class QuantizedRows(NamedTuple):
    """values * scale: [..., C] e4m3 and [..., 1] fp32. Of an fp64 tensor both are fp64 and nothing is rounded."""

    values: Tensor
    scale: Tensor


def dequantized(rows: QuantizedRows) -> Tensor:
    """values * scale in the dtype of the scale, [..., C]."""
    return rows.values.to(rows.scale.dtype) * rows.scale


def quantize_rows(x: Tensor | None, gelu_of: Tensor | None = None) -> QuantizedRows:
    """Quantize every row of cat([x, GELU(gelu_of)]) so that its largest magnitude becomes 448, the most e4m3 holds.

    Args:
        x: [..., D], fp32 or bf16, or None; [B, L, D] may be a slice of a longer sequence.
        gelu_of: [..., G] of the same leading dimensions and dtype, or None; its GELU is the tanh form.

    Returns: values [..., D + G] and scale [..., 1]; arithmetic is fp32, the rounding is to the nearest.

    Raises:
        ValueError: both are None, or they differ in leading dimensions, dtype or device.
    """
    given = [t for t in (x, gelu_of) if t is not None]
    if not given:
        raise ValueError("x, gelu_of: give one of them, or both")
    first, last = given[0], given[-1]
    if (first.shape[:-1], first.dtype, first.device) != (last.shape[:-1], last.dtype, last.device):
        allowed = f"{tuple(first.shape[:-1])} and channels, {first.dtype} on {first.device} as x"
        raise ValueError(f"gelu_of={tuple(last.shape)} {last.dtype} on {last.device}: must be {allowed}")
    if backend_for(first) == "torch":
        return quantize_rows_reference(x, gelu_of)
    return QuantizedRows(*_quantize_op(x, gelu_of))


def quantize_rows_reference(x: Tensor | None, gelu_of: Tensor | None = None) -> QuantizedRows:
    parts = [] if x is None else [x]
    if gelu_of is not None:
        parts.append(F.gelu(gelu_of, approximate="tanh"))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    exact = rows.dtype == torch.float64
    rows = rows if exact else rows.float()
    row_max = rows.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ROW_MAX)
    scaled = rows * (E4M3_MAX / row_max)
    return QuantizedRows(scaled if exact else scaled.to(E4M3), row_max / E4M3_MAX)


@triton.jit
def to_e4m3(x, EMULATE: tl.constexpr):
    """fp32 of magnitude up to 448 -> the nearest e4m3, ties to even.

    EMULATE rounds in fp32 first: the interpreter's own conversion drops the carry into the exponent.
    """
    if EMULATE:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2**14: one unit in the last place is e4m3's smallest, 2**-9
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _quantize_kernel(
    x_ptr, gelu_ptr, values_ptr, scale_ptr, x_batch, x_row, gelu_batch, gelu_row, L,
    D: tl.constexpr, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: B * L * C can pass 2**31
    sample, token = row // L, row % L
    row_max = 1e-12
    if D > 0:
        cols = tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + sample * x_batch + token * x_row + cols, mask=cols < D, other=0.0).to(tl.float32)
        row_max = tl.maximum(row_max, tl.max(tl.abs(x), axis=0))
    if G > 0:
        gelu_cols = tl.arange(0, BLOCK_G)
        at = gelu_ptr + sample * gelu_batch + token * gelu_row + gelu_cols
        y = gelu_tanh(tl.load(at, mask=gelu_cols < G, other=0.0).to(tl.float32))
        row_max = tl.maximum(row_max, tl.max(tl.abs(y), axis=0))
    tl.store(scale_ptr + row, tl.div_rn(row_max, 448.0))  # exact divisions: the reference's bits
    inverse = tl.div_rn(448.0, row_max)
    out = values_ptr + row * (D + G)
    if D > 0:
        tl.store(out + cols, to_e4m3(x * inverse, EMULATE), mask=cols < D)
    if G > 0:
        tl.store(out + D + gelu_cols, to_e4m3(y * inverse, EMULATE), mask=gelu_cols < G)


def as_sequence(x: Tensor) -> Tensor:
    """[..., C] -> [B, L, C] with contiguous channels; slices of a sequence are not copied."""
    return channels_last(x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]))


@torch.library.custom_op("uniworld::quantize_rows", mutates_args=())
def _quantize_op(x: Tensor | None, gelu_of: Tensor | None) -> tuple[Tensor, Tensor]:
    values, scale = _empty_rows(x, gelu_of)
    if values.numel() == 0:
        return values, scale
    D, G = (0 if t is None else t.shape[-1] for t in (x, gelu_of))
    # A tensor that is not given is not read: the other one stands for its pointer.
    x, gelu_of = (as_sequence(t) for t in (gelu_of if x is None else x, x if gelu_of is None else gelu_of))
    _quantize_kernel[(scale.numel(),)](
        x, gelu_of, values, scale, x.stride(0), x.stride(1), gelu_of.stride(0), gelu_of.stride(1), x.shape[1],
        D=D, G=G, BLOCK_D=triton.next_power_of_2(D), BLOCK_G=triton.next_power_of_2(G), EMULATE=INTERPRET,
        num_warps=num_warps_for(D + G),
    )  # fmt: skip
    return values, scale


@_quantize_op.register_fake
def _(x, gelu_of):
    return _empty_rows(x, gelu_of)


def _empty_rows(x: Tensor | None, gelu_of: Tensor | None) -> tuple[Tensor, Tensor]:
    first = gelu_of if x is None else x
    channels = sum(t.shape[-1] for t in (x, gelu_of) if t is not None)
    values = first.new_empty(*first.shape[:-1], channels, dtype=E4M3)
    return values, first.new_empty(*first.shape[:-1], 1, dtype=torch.float32)


def num_warps_for(channels: int) -> int:
    """A row is held in registers: one of a single block's 15,360 channels needs twice the threads."""
    return 8 if channels <= 4096 else 16


def _make_inputs(B, L, D, G, dtype, device):
    """x is a slice of a longer sequence, as one stream of the joint attention is; a row of zeros is among them."""
    x = torch.randn(B, L + 3, D, dtype=dtype, device=device)[:, 2 : L + 2] if D else None
    gelu_of = torch.randn(B, L, G, dtype=dtype, device=device) * 3 if G else None
    for given in (x, gelu_of):
        if given is not None:
            given[0, 0] = 0
    return {"x": x, "gelu_of": gelu_of}


def fp8_build(build: TritonBuild) -> TritonBuild:
    """The build of a kernel that writes e4m3 to `values_ptr`, for the devices that have it."""
    return replace(build, signature=build.signature | {"values_ptr": "*fp8e4nv"}, capabilities=FP8_CAPABILITIES)


def _build(element: str, D: int, G: int) -> TritonBuild:
    sizes = {"D": D, "G": G, "BLOCK_D": triton.next_power_of_2(D), "BLOCK_G": triton.next_power_of_2(G)}
    options = {"element": element, "fp32": ("scale_ptr",), "num_warps": num_warps_for(D + G)}
    return fp8_build(triton_build(_quantize_kernel, {**sizes, "EMULATE": False}, **options))


SIZES = ((3072, 0), (0, 12288), (3072, 12288))  # attention output, MLP, both of a single block

register(
    Op(
        name="quantize_rows",
        fn=quantize_rows,
        reference=quantize_rows_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "L": 2, "D": 16, "G": 0},
            {"B": 3, "L": 5, "D": 0, "G": 70},
            {"B": 2, "L": 7, "D": 33, "G": 130},
        ),
        bench_cases=tuple({"B": 1, "L": 4608, "D": D, "G": G} for D, G in SIZES),
        bytes_moved=lambda c: c["B"] * c["L"] * (3 * (c["D"] + c["G"]) + 4),
        triton_builds=tuple(_build(e, D, G) for e in ("*bf16", "*fp32") for D, G in SIZES),
        decode=dequantized,
    )
)
