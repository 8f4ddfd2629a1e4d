"""gate_residual: the gated residual sum; gate_residual_adaln: with the next norm and modulation in the same pass.

Letters: B batch, L tokens, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.adaln_modulate import adaln_modulate_reference, check_modulation, normalize_row
from uniworld.kernels.extension import core
from uniworld.kernels.registry import (
    DTYPE_CODES,
    Op,
    backend_for,
    channels_last,
    register,
    triton_build,
    uses_cpp,
)

ROWS_PER_PROGRAM = 16  # tokens of one partial sum in the backward passes


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, the gate per sample.

    Args:
        x, y: [B, L, D], fp32 or bf16 (other types take the reference).
        gate: [B, D], dtype of x; rows may be strided.

    Returns: [B, L, D], dtype of x.

    Raises:
        ValueError: a shape, a dtype or a device does not fit x.
    """
    check_gated(x, y, gate=gate)
    if backend_for(x, cpp="gate_residual") == "torch":
        return gate_residual_reference(x, y, gate)
    return _gate_op(x, y, gate)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def gate_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`gate_residual`, then `adaln_modulate` of the sum.

    Args:
        x, y: [B, L, D], fp32 or bf16 (other types take the reference).
        gate, scale, shift: [B, D], dtype of x; rows may be strided.
        eps: added to the variance.

    Returns: residual and modulated, each [B, L, D], dtype of x. The norm sees the sum before it is rounded.

    Raises:
        ValueError: a shape, a dtype or a device does not fit x.
    """
    check_gated(x, y, gate=gate, scale=scale, shift=shift)
    if backend_for(x, cpp="gate_residual_adaln") == "torch":
        return gate_residual_adaln_reference(x, y, gate, scale, shift, eps)
    return _gate_adaln_op(x, y, gate, scale, shift, eps)[:2]


def gate_residual_adaln_reference(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    residual = gate_residual_reference(x, y, gate)
    return residual, adaln_modulate_reference(residual, scale, shift, eps)


def check_gated(x: Tensor, y: Tensor, **vectors: Tensor) -> None:
    check_modulation(x, **vectors)
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        allowed = f"{tuple(x.shape)} {x.dtype} on {x.device} as x"
        raise ValueError(f"y={tuple(y.shape)} {y.dtype} on {y.device}: must be {allowed}")


@triton.jit
def _gate_kernel(x_ptr, y_ptr, gate_ptr, out_ptr, gate_stride, L, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # int64: B * L * D can pass 2**31
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + row * D + cols, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + (row // L) * gate_stride + cols, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * D + cols, x + gate * y, mask=mask)


@triton.jit
def _gate_backward_kernel(
    dout_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr, gate_stride, L,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    gate = tl.load(gate_ptr + sample * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(block * ROWS, min((block + 1) * ROWS, L)):
        row = (sample * L + token) * D
        dout = tl.load(dout_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row + cols, dout * gate, mask=mask)
        dgate += dout * y
    tl.store(dgate_ptr + (sample * tl.num_programs(1) + block) * D + cols, dgate, mask=mask)


@triton.jit
def _gate_adaln_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, residual_ptr, modulated_ptr, mean_ptr, rstd_ptr,
    gate_stride, scale_stride, shift_stride, L, D: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sample * shift_stride + cols, mask=mask, other=0.0).to(tl.float32)
    residual = x + gate * y
    tl.store(residual_ptr + row * D + cols, residual, mask=mask)
    normed, mean, rstd = normalize_row(residual, mask, D, EPS)
    tl.store(modulated_ptr + row * D + cols, normed * (1.0 + scale) + shift, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _gate_adaln_backward_kernel(
    dresidual_ptr, dmodulated_ptr, residual_ptr, y_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dy_ptr, dgate_ptr, dscale_ptr, dshift_ptr, gate_stride, scale_stride, L,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    gate = tl.load(gate_ptr + sample * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(block * ROWS, min((block + 1) * ROWS, L)):
        row = sample * L + token
        at = row * D + cols
        dmodulated = tl.load(dmodulated_ptr + at, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dresidual = tl.load(dresidual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(mask, (residual - tl.load(mean_ptr + row)) * rstd, 0.0)
        g = dmodulated * (1.0 + scale)
        dx = dresidual + rstd * (g - tl.sum(g, axis=0) / D - normed * (tl.sum(g * normed, axis=0) / D))
        tl.store(dx_ptr + at, dx, mask=mask)
        tl.store(dy_ptr + at, dx * gate, mask=mask)
        dgate += dx * y
        dscale += dmodulated * normed
        dshift += dmodulated
    out = (sample * tl.num_programs(1) + block) * D + cols
    tl.store(dgate_ptr + out, dgate, mask=mask)
    tl.store(dscale_ptr + out, dscale, mask=mask)
    tl.store(dshift_ptr + out, dshift, mask=mask)


@torch.library.custom_op("uniworld::gate_residual", mutates_args=())
def _gate_op(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x, y, gate = x.contiguous(), y.contiguous(), channels_last(gate)
    B, L, D = x.shape
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    if uses_cpp(x, "gate_residual"):
        core().gate_residual(
            DTYPE_CODES[x.dtype], x.data_ptr(), y.data_ptr(), gate.data_ptr(), gate.stride(0), out.data_ptr(), B, L, D
        )
        return out
    _gate_kernel[(B * L,)](
        x, y, gate, out, gate.stride(0), L, D=D, BLOCK_D=triton.next_power_of_2(D), num_warps=8
    )  # fmt: skip
    return out


@_gate_op.register_fake
def _(x, y, gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _partial_sums(x: Tensor, count: int) -> list[Tensor]:
    """fp32 [B, blocks, D] buffers: partial sums and no atomics give the same bits every run."""
    B, L, D = x.shape
    blocks = triton.cdiv(L, ROWS_PER_PROGRAM)
    return [x.new_empty(B, blocks, D, dtype=torch.float32) for _ in range(count)]


@torch.library.custom_op("uniworld::gate_residual_backward", mutates_args=())
def _gate_backward_op(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dout, y, gate = dout.contiguous(), y.contiguous(), channels_last(gate)
    B, L, D = y.shape
    dy = torch.empty_like(y)
    (dgate,) = _partial_sums(y, 1)
    if y.numel() == 0:
        pass
    elif uses_cpp(y, "gate_residual_backward"):
        core().gate_residual_backward(
            DTYPE_CODES[y.dtype], dout.data_ptr(), y.data_ptr(), gate.data_ptr(), gate.stride(0), dy.data_ptr(),
            dgate.data_ptr(), B, L, D, ROWS_PER_PROGRAM,
        )  # fmt: skip
    else:
        _gate_backward_kernel[dgate.shape[:2]](
            dout, y, gate, dy, dgate, gate.stride(0), L,
            D=D, ROWS=ROWS_PER_PROGRAM, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
        )  # fmt: skip
    return dy, dgate.sum(1).to(gate.dtype)


@_gate_backward_op.register_fake
def _(dout, y, gate):
    return torch.empty_like(y, memory_format=torch.contiguous_format), gate.new_empty(gate.shape)


def _setup_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward_gate(ctx, dout):
    return dout, *_gate_backward_op(dout, *ctx.saved_tensors)


_gate_op.register_autograd(_backward_gate, setup_context=_setup_gate)


@torch.library.custom_op("uniworld::gate_residual_adaln", mutates_args=())
def _gate_adaln_op(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, gate, scale, shift = x.contiguous(), y.contiguous(), *map(channels_last, (gate, scale, shift))
    B, L, D = x.shape
    residual, modulated = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = x.new_empty(B, L, dtype=torch.float32), x.new_empty(B, L, dtype=torch.float32)
    if x.numel() == 0:
        return residual, modulated, mean, rstd
    if uses_cpp(x, "gate_residual_adaln"):
        core().gate_residual_adaln(
            DTYPE_CODES[x.dtype], x.data_ptr(), y.data_ptr(), gate.data_ptr(), gate.stride(0), scale.data_ptr(),
            scale.stride(0), shift.data_ptr(), shift.stride(0), residual.data_ptr(), modulated.data_ptr(),
            mean.data_ptr(), rstd.data_ptr(), B, L, D, eps,
        )  # fmt: skip
        return residual, modulated, mean, rstd
    _gate_adaln_kernel[(B * L,)](
        x, y, gate, scale, shift, residual, modulated, mean, rstd, gate.stride(0), scale.stride(0), shift.stride(0), L,
        D=D, EPS=eps, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
    )  # fmt: skip
    return residual, modulated, mean, rstd


@_gate_adaln_op.register_fake
def _(x, y, gate, scale, shift, eps):
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    stats = x.new_empty(x.shape[:2], dtype=torch.float32)
    return residual, torch.empty_like(residual), stats, torch.empty_like(stats)


@torch.library.custom_op("uniworld::gate_residual_adaln_backward", mutates_args=())
def _gate_adaln_backward_op(
    dresidual: Tensor, dmodulated: Tensor, residual: Tensor, y: Tensor, gate: Tensor, scale: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dresidual, dmodulated, y = dresidual.contiguous(), dmodulated.contiguous(), y.contiguous()
    gate, scale = channels_last(gate), channels_last(scale)
    B, L, D = y.shape
    dx, dy = torch.empty_like(y), torch.empty_like(y)
    dgate, dscale, dshift = _partial_sums(y, 3)
    if y.numel() == 0:
        pass
    elif uses_cpp(y, "gate_residual_adaln_backward"):
        core().gate_residual_adaln_backward(
            DTYPE_CODES[y.dtype], dresidual.data_ptr(), dmodulated.data_ptr(), residual.data_ptr(), y.data_ptr(),
            gate.data_ptr(), gate.stride(0), scale.data_ptr(), scale.stride(0), mean.data_ptr(), rstd.data_ptr(),
            dx.data_ptr(), dy.data_ptr(), dgate.data_ptr(), dscale.data_ptr(), dshift.data_ptr(),
            B, L, D, ROWS_PER_PROGRAM,
        )  # fmt: skip
    else:
        _gate_adaln_backward_kernel[dgate.shape[:2]](
            dresidual, dmodulated, residual, y, gate, scale, mean, rstd, dx, dy, dgate, dscale, dshift,
            gate.stride(0), scale.stride(0), L,
            D=D, ROWS=ROWS_PER_PROGRAM, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
        )  # fmt: skip
    return dx, dy, *(sums.sum(1).to(y.dtype) for sums in (dgate, dscale, dshift))


@_gate_adaln_backward_op.register_fake
def _(dresidual, dmodulated, residual, y, gate, scale, mean, rstd):
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(dx), *(gate.new_empty(gate.shape) for _ in range(3))


def _setup_gate_adaln(ctx, inputs, output):
    _, y, gate, scale, _, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual, y, gate, scale, mean, rstd)


def _backward_gate_adaln(ctx, dresidual, dmodulated, _dmean, _drstd):
    return *_gate_adaln_backward_op(dresidual, dmodulated, *ctx.saved_tensors), None


_gate_adaln_op.register_autograd(_backward_gate_adaln, setup_context=_setup_gate_adaln)


def _make_inputs(B, L, D, dtype, device):
    x, y = (torch.randn(B, L, D, dtype=dtype, device=device) for _ in range(2))
    table = torch.randn(B, 4, D, dtype=dtype, device=device)  # modulations are rows of a bigger table
    return {"x": x, "y": y, "gate": table[:, 1]}


def _make_adaln_inputs(B, L, D, dtype, device):
    inputs = _make_inputs(B, L, D, dtype, device)
    table = torch.randn(B, 4, D, dtype=dtype, device=device)
    return inputs | {"scale": table[:, 3], "shift": table[:, 0]}


def _builds(element, forward, backward):
    sizes = {"D": 3072, "BLOCK_D": 4096}
    sums = ("mean_ptr", "rstd_ptr", "dgate_ptr", "dscale_ptr", "dshift_ptr")
    forward_sizes = sizes if forward is _gate_kernel else {**sizes, "EPS": 1e-6}
    options = {"element": element, "fp32": sums, "num_warps": 8}
    return (
        triton_build(forward, forward_sizes, **options),
        triton_build(backward, {**sizes, "ROWS": ROWS_PER_PROGRAM}, **options),
    )


CASES = ({"B": 1, "L": 1, "D": 64}, {"B": 3, "L": 16, "D": 130}, {"B": 2, "L": 37, "D": 96})
BENCH_CASES = ({"B": 1, "L": 4608, "D": 3072},)

register(
    Op(
        name="gate_residual",
        fn=gate_residual,
        reference=gate_residual_reference,
        make_inputs=_make_inputs,
        cases=CASES,
        bench_cases=BENCH_CASES,
        bytes_moved=lambda c: 2 * 3 * c["B"] * c["L"] * c["D"],
        differentiable=("x", "y", "gate"),
        triton_builds=tuple(
            b for e in ("*bf16", "*fp32") for b in _builds(e, _gate_kernel, _gate_backward_kernel)
        ),
        cpp="gate_residual",
    )
)  # fmt: skip
register(
    Op(
        name="gate_residual_adaln",
        fn=gate_residual_adaln,
        reference=gate_residual_adaln_reference,
        make_inputs=_make_adaln_inputs,
        cases=CASES,
        bench_cases=BENCH_CASES,
        bytes_moved=lambda c: 2 * 4 * c["B"] * c["L"] * c["D"],
        differentiable=("x", "y", "gate", "scale", "shift"),
        triton_builds=tuple(
            b for e in ("*bf16", "*fp32") for b in _builds(e, _gate_adaln_kernel, _gate_adaln_backward_kernel)
        ),
        cpp="gate_residual_adaln",
    )
)
