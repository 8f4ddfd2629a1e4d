"""connector_mlp: Linear, SiLU, Linear, whose rows land at their places in the text sequence.

Letters: T input rows, K input channels, C hidden channels, N output channels, R rows of the text sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniworld.kernels.linear_epilogue import (
    LARGE_TILE,
    ONEDNN,
    SMALL_TILE,
    WIDE_TILE,
    epilogue_build,
    linear_epilogue_,
    linear_gradients,
    linear_onednn,
)
from uniworld.kernels.registry import Op, backend_for, register


def connector_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor | None = None,
    num_rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SiLU(x @ w1.T + b1) @ w2.T + b2, scattered to `rows` of a sequence of R rows.

    Without gradients, a given `out` is written in place, so that several connectors fill one sequence without a copy.
    Where a gradient is needed, `out` is left alone and the result is a copy of it with these rows overwritten. Use the
    result in both cases.

    Args:
        x: [T, K]; T may be 0.
        w1, b1, w2, b2: [C, K], [C], [N, C], [N], dtype of x.
        rows: [T] int64, the row of the result that each input row goes to, no row twice; negative drops the input
            row. None: row t goes to row t.
        num_rows: R, where `out` is not given; needed with `rows`. Rows that nobody writes are zero.
        out: [R, N], dtype of x, rows contiguous.

    Returns: [R, N], dtype of x; accumulation, biases and SiLU are fp32. The backward pass recomputes the hidden layer.

    Raises:
        ValueError: shapes or dtypes do not fit; on the CPU, also if a row is not in the result (a GPU drops it).
    """
    num_rows = _check(x, w1, b1, w2, b2, rows, num_rows, out)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2, out) if t is not None)
    if out is not None and not needs_gradient:
        _inplace_op(out, x, w1, b1, w2, b2, rows)
        return out
    if backend_for(x, cpp=ONEDNN) == "torch":
        return connector_mlp_reference(x, w1, b1, w2, b2, rows, num_rows, out)
    return _forward_op(x, w1, b1, w2, b2, rows, num_rows, out)


def connector_mlp_reference(x, w1, b1, w2, b2, rows=None, num_rows=None, out=None) -> Tensor:
    y = F.linear(F.silu(F.linear(x, w1, b1)), w2, b2)
    if rows is None:
        rows = torch.arange(len(x), device=x.device)
    if out is None:
        out = x.new_zeros(len(x) if num_rows is None else num_rows, w2.shape[0])
    keep = rows >= 0
    return out.index_copy(0, rows[keep], y[keep])


def _check(x, w1, b1, w2, b2, rows, num_rows, out) -> int:
    """Refuse what does not fit; returns R."""
    if x.ndim != 2:
        raise ValueError(f"x={tuple(x.shape)}: must be [T, K]")
    (T, K), C, N = x.shape, b1.shape[0], b2.shape[0]
    for name, tensor, shape in (("w1", w1, (C, K)), ("b1", b1, (C,)), ("w2", w2, (N, C)), ("b2", b2, (N,))):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            raise ValueError(f"{name}={tuple(tensor.shape)} {tensor.dtype}: must be {shape} {x.dtype}")
    if rows is not None and (rows.shape != (T,) or rows.dtype != torch.int64):
        raise ValueError(f"rows={tuple(rows.shape)} {rows.dtype}: must be {(T,)} torch.int64")
    if out is None:
        if num_rows is None and rows is not None:
            raise ValueError("num_rows=None: must be given with rows where out is not")
        num_rows = T if num_rows is None else num_rows
    else:
        if out.ndim != 2 or out.shape[1] != N or out.stride(1) != 1 or out.dtype != x.dtype:
            raise ValueError(f"out={tuple(out.shape)} {out.dtype}: must be [R, {N}] {x.dtype} with contiguous rows")
        if num_rows not in (None, out.shape[0]):
            raise ValueError(f"num_rows={num_rows}: must be that of out, {out.shape[0]}, or None")
        num_rows = out.shape[0]
    if rows is None and num_rows < T:
        raise ValueError(f"num_rows={num_rows}: must be at least the {T} rows of x where rows is None")
    return num_rows


def _hidden(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """SiLU(x @ w1.T + b1), [T, C]."""
    backend = backend_for(x, cpp=ONEDNN)
    if backend == "torch":
        return F.silu(F.linear(x, w1, b1))
    if backend == "cpp":
        return linear_onednn(x.contiguous(), w1.contiguous(), b1, "silu")
    hidden = x.new_empty(x.shape[0], w1.shape[0])
    linear_epilogue_(hidden, x.contiguous(), w1.contiguous(), b1.contiguous(), "silu")
    return hidden


@torch.library.custom_op("uniworld::connector_mlp_", mutates_args={"out"})
def _inplace_op(
    out: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor | None
) -> None:
    backend = backend_for(x, cpp=ONEDNN)
    if backend == "triton":
        rows = None if rows is None else rows.contiguous()
        linear_epilogue_(out, _hidden(x, w1, b1), w2.contiguous(), b2.contiguous(), "none", rows=rows)
        return
    if rows is not None:
        if x.device.type == "cpu" and bool((rows >= out.shape[0]).any()):
            raise ValueError(f"rows={int(rows.max())}: must be below {out.shape[0]}, the number of rows of the result")
        keep = rows >= 0
        x, rows = x[keep], rows[keep]
    hidden = _hidden(x, w1, b1)
    y = linear_onednn(hidden, w2.contiguous(), b2) if backend == "cpp" else F.linear(hidden, w2, b2)
    if rows is None:
        out[: len(y)] = y
    else:
        out.index_copy_(0, rows, y)


@_inplace_op.register_fake
def _(out, x, w1, b1, w2, b2, rows):
    return None


@torch.library.custom_op("uniworld::connector_mlp", mutates_args=())
def _forward_op(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: Tensor | None, num_rows: int, base: Tensor | None
) -> Tensor:
    N = w2.shape[0]
    if base is not None:
        out = base.clone(memory_format=torch.contiguous_format)
    elif rows is None and num_rows == x.shape[0]:
        out = x.new_empty(num_rows, N)  # every row is written
    else:
        out = x.new_zeros(num_rows, N)
    _inplace_op(out, x, w1, b1, w2, b2, rows)
    return out


@_forward_op.register_fake
def _(x, w1, b1, w2, b2, rows, num_rows, base):
    return x.new_empty(num_rows, w2.shape[0])


def _flops_of_shapes(x_shape, w1_shape, w2_shape) -> int:
    return 2 * x_shape[0] * w1_shape[0] * (x_shape[1] + w2_shape[0])


@register_flop_formula(torch.ops.uniworld.connector_mlp)
def _(x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs) -> int:
    return _flops_of_shapes(x_shape, w1_shape, w2_shape)


@register_flop_formula(torch.ops.uniworld.connector_mlp_)
def _(buffer_shape, x_shape, w1_shape, b1_shape, w2_shape, *args, **kwargs) -> int:
    return _flops_of_shapes(x_shape, w1_shape, w2_shape)


@torch.library.custom_op("uniworld::connector_mlp_hidden", mutates_args=())
def _hidden_op(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return _hidden(x, w1, b1)


@_hidden_op.register_fake
def _(x, w1, b1):
    return x.new_empty(x.shape[0], w1.shape[0])


@torch.library.custom_op("uniworld::connector_mlp_hidden_backward", mutates_args=())
def _hidden_backward_op(dhidden: Tensor, x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activation, and the hidden layer computed anew, each [T, C]."""
    dhidden = dhidden.contiguous()
    if backend_for(x, cpp=ONEDNN) != "triton":
        pre = F.linear(x, w1, b1)
        return torch.ops.aten.silu_backward(dhidden, pre), F.silu(pre)
    dpre, hidden = torch.empty_like(dhidden), torch.empty_like(dhidden)
    linear_epilogue_(dpre, x.contiguous(), w1.contiguous(), b1.contiguous(), "silu_backward", dy=dhidden, act=hidden)
    return dpre, hidden


@_hidden_backward_op.register_fake
def _(dhidden, x, w1, b1):
    dpre = torch.empty_like(dhidden, memory_format=torch.contiguous_format)
    return dpre, torch.empty_like(dpre)


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, _, rows, num_rows, _ = inputs
    ctx.num_rows = num_rows
    ctx.save_for_backward(x, w1, b1, w2, rows)


def _autograd_backward(ctx, dout):
    x, w1, b1, w2, rows = ctx.saved_tensors
    need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
    if rows is None:
        dy = dout[: x.shape[0]]
    elif ctx.num_rows == 0:
        dy = dout.new_zeros(len(x), dout.shape[1])
    else:
        dy = dout.index_select(0, rows.clamp(0, ctx.num_rows - 1))
        dy = torch.where(((rows >= 0) & (rows < ctx.num_rows))[:, None], dy, 0)
    dx = dw1 = db1 = hidden = None
    if need_x or need_w1 or need_b1:
        dpre, hidden = _hidden_backward_op(dy @ w2, x, w1, b1)
        dx, dw1, db1 = linear_gradients(dpre, x, w1, (need_x, need_w1, need_b1))
    elif need_w2:
        hidden = _hidden_op(x, w1, b1)
    dw2 = dy.t() @ hidden if need_w2 else None
    db2 = dy.sum(0) if need_b2 else None
    return dx, dw1, db1, dw2, db2, None, None, _base_gradient(ctx, dout, rows, len(x))


def _base_gradient(ctx, dout: Tensor, rows: Tensor | None, num_inputs: int) -> Tensor | None:
    """`dout` with the rows zeroed that this op wrote; no host sync."""
    if not ctx.needs_input_grad[7]:
        return None
    if rows is None:
        return torch.cat([torch.zeros_like(dout[:num_inputs]), dout[num_inputs:]])
    slots = torch.where(rows < 0, ctx.num_rows, rows.clamp(max=ctx.num_rows))  # dropped rows mark a slot past the end
    written = torch.zeros(ctx.num_rows + 1, dtype=torch.bool, device=dout.device).index_fill(0, slots, True)
    return torch.where(written[: ctx.num_rows, None], 0, dout)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _make_inputs(T, K, C, N, R, base, dtype, device):
    """`R` = 0: no scatter. Else every fourth input row is dropped and the others go to shuffled rows of R."""

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, dtype=dtype, device=device) * scale

    inputs = {"x": normal(T, K), "w1": normal(C, K, scale=K**-0.5), "b1": normal(C)}
    inputs |= {"w2": normal(N, C, scale=C**-0.5), "b2": normal(N)}
    if R:
        rows = torch.randperm(R, device=device)[:T]
        rows[::4] = -1
        inputs["rows"] = rows
        inputs |= {"out": normal(R, N)} if base else {"num_rows": R}
    return inputs


def _flops(c):
    return 2 * c["T"] * c["C"] * (c["K"] + c["N"])


register(
    Op(
        name="connector_mlp",
        fn=connector_mlp,
        reference=connector_mlp_reference,
        make_inputs=_make_inputs,
        cases=(
            {"T": 0, "K": 16, "C": 24, "N": 8, "R": 0, "base": 0},
            {"T": 5, "K": 33, "C": 48, "N": 20, "R": 0, "base": 0},
            {"T": 37, "K": 40, "C": 70, "N": 36, "R": 50, "base": 0},
            {"T": 35, "K": 40, "C": 66, "N": 33, "R": 41, "base": 1},
        ),
        bench_cases=({"T": 300, "K": 3584, "C": 12288, "N": 4096, "R": 1324, "base": 1},),
        bytes_moved=lambda c: 2 * ((c["T"] + c["C"]) * c["K"] + 2 * c["T"] * c["C"] + (c["C"] + c["T"]) * c["N"]),
        flops=_flops,
        differentiable=("x", "w1", "b1", "w2", "b2"),
        triton_builds=(
            epilogue_build("silu", WIDE_TILE),
            epilogue_build("silu", LARGE_TILE),
            epilogue_build("silu", SMALL_TILE),
            epilogue_build("none", WIDE_TILE),
            epilogue_build("none", LARGE_TILE),
            epilogue_build("none", SMALL_TILE),
            epilogue_build("silu_backward", LARGE_TILE),
            epilogue_build("silu_backward", SMALL_TILE),
        ),
        cpp=ONEDNN,
    )
)
