"""adaln_modulate_fp8 and gate_residual_adaln_fp8: the norms before quantized linears, that write e4m3 rows themselves.

Letters: B batch, L tokens, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.adaln_modulate import adaln_modulate_reference, check_modulation, normalize_row
from uniworld.kernels.gate_residual import check_gated, gate_residual_adaln_reference
from uniworld.kernels.quantize_rows import E4M3, QuantizedRows, dequantized, fp8_build, quantize_rows_reference, to_e4m3
from uniworld.kernels.registry import INTERPRET, OPS, Op, backend_for, channels_last, register, triton_build


def adaln_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> QuantizedRows:
    """`adaln_modulate`, each token quantized as by `quantize_rows`; arguments and errors as there.

    Returns: values [B, L, D] e4m3 and their scales [B, L, 1] fp32. Nothing is rounded before the quantization.
    """
    check_modulation(x, scale=scale, shift=shift)
    if backend_for(x) == "torch":
        return adaln_modulate_fp8_reference(x, scale, shift, eps)
    return QuantizedRows(*_adaln_op(x, scale, shift, eps))


def adaln_modulate_fp8_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> QuantizedRows:
    return quantize_rows_reference(adaln_modulate_reference(x, scale, shift, eps))


def gate_residual_adaln_fp8(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, QuantizedRows]:
    """`gate_residual_adaln`, its second result quantized as by `quantize_rows`; arguments and errors as there."""
    check_gated(x, y, gate=gate, scale=scale, shift=shift)
    if backend_for(x) == "torch":
        return gate_residual_adaln_fp8_reference(x, y, gate, scale, shift, eps)
    residual, values, row_scale = _gate_adaln_op(x, y, gate, scale, shift, eps)
    return residual, QuantizedRows(values, row_scale)


def gate_residual_adaln_fp8_reference(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, QuantizedRows]:
    residual, modulated = gate_residual_adaln_reference(x, y, gate, scale, shift, eps)
    return residual, quantize_rows_reference(modulated)


@triton.jit
def _adaln_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, residual_ptr, values_ptr, row_scale_ptr,
    gate_stride, scale_stride, shift_stride, L,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, GATED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """GATED adds gate * y to x first and stores the sum."""
    row = tl.program_id(0).to(tl.int64)  # int64: B * L * D can pass 2**31
    sample = row // L
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(y_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(gate_ptr + sample * gate_stride + cols, mask=mask, other=0.0).to(tl.float32) * y
        tl.store(residual_ptr + row * D + cols, x, mask=mask)
    normed, _, _ = normalize_row(x, mask, D, EPS)
    modulated = normed * (1.0 + scale) + shift  # zero past D
    row_max = tl.maximum(tl.max(tl.abs(modulated), axis=0), 1e-12)
    tl.store(row_scale_ptr + row, tl.div_rn(row_max, 448.0))
    tl.store(values_ptr + row * D + cols, to_e4m3(modulated * tl.div_rn(448.0, row_max), EMULATE), mask=mask)


def _launch(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, eps: float,
            gated: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, L, D = x.shape
    values, row_scale = _empty_rows(x)
    if x.numel():
        _adaln_kernel[(B * L,)](
            x, y, gate, scale, shift, residual, values, row_scale, gate.stride(0), scale.stride(0), shift.stride(0), L,
            D=D, EPS=eps, BLOCK_D=triton.next_power_of_2(D), GATED=gated, EMULATE=INTERPRET, num_warps=8,
        )  # fmt: skip
    return values, row_scale


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(*x.shape[:2], 1, dtype=torch.float32)


@torch.library.custom_op("uniworld::adaln_modulate_fp8", mutates_args=())
def _adaln_op(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, scale, shift = x.contiguous(), channels_last(scale), channels_last(shift)
    return _launch(x, x, scale, scale, shift, x, eps, gated=False)


@_adaln_op.register_fake
def _(x, scale, shift, eps):
    return _empty_rows(x)


@torch.library.custom_op("uniworld::gate_residual_adaln_fp8", mutates_args=())
def _gate_adaln_op(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, gate, scale, shift = x.contiguous(), y.contiguous(), *map(channels_last, (gate, scale, shift))
    residual = torch.empty_like(x)
    return residual, *_launch(x, y, gate, scale, shift, residual, eps, gated=True)


@_gate_adaln_op.register_fake
def _(x, y, gate, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_empty_rows(x)


def _build(element: str, gated: bool):
    sizes = {"D": 3072, "BLOCK_D": 4096, "EPS": 1e-6, "GATED": gated, "EMULATE": False}
    return fp8_build(triton_build(_adaln_kernel, sizes, element=element, fp32=("row_scale_ptr",), num_warps=8))


def _decode_second(results: tuple[Tensor, QuantizedRows]) -> tuple[Tensor, Tensor]:
    return results[0], dequantized(results[1])


def _register(fn, reference, like: str, bytes_a_token, decode) -> None:
    """Register an op with the inputs and cases of the unquantized one that it is `like`."""
    plain = OPS[like]
    register(
        Op(
            name=fn.__name__,
            fn=fn,
            reference=reference,
            make_inputs=plain.make_inputs,
            cases=plain.cases,
            bench_cases=plain.bench_cases,
            bytes_moved=lambda c: c["B"] * c["L"] * bytes_a_token(c["D"]),
            triton_builds=tuple(_build(e, like != "adaln_modulate") for e in ("*bf16", "*fp32")),
            decode=decode,
        )
    )


_register(adaln_modulate_fp8, adaln_modulate_fp8_reference, "adaln_modulate", lambda D: 3 * D + 4, dequantized)
_register(
    gate_residual_adaln_fp8,
    gate_residual_adaln_fp8_reference,
    "gate_residual_adaln",
    lambda D: 7 * D + 4,
    _decode_second,
)
