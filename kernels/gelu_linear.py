"""gelu_linear: GELU (tanh form) of a Linear, with bias and GELU in the GEMM's epilogue.

Letters: M tokens (all leading dimensions together), K input channels, N output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
from uniworld.kernels.registry import Op, backend_for, forced_backend, register

# Whether cuBLASLt's own bias + GELU epilogue serves CUDA tensors, or linear_epilogue_kernel does. cuBLASLt is expected
# to be the faster GEMM on Hopper; neither has been timed on a GPU yet. `use_backend("triton")` gives the other.
USE_CUBLASLT = True


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x @ weight.T + bias), GELU in its tanh form.

    Args:
        x: [..., K].
        weight: [N, K], dtype of x.
        bias: [N], dtype of x.

    Returns: [..., N], dtype of x; accumulation, bias and GELU are fp32. The backward pass recomputes the
    pre-activation instead of keeping it.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.shape != (bias.shape[0], x.shape[-1]):
        expected = (bias.shape[0], x.shape[-1])
        raise ValueError(f"weight={tuple(weight.shape)}: must be {expected} for bias [N] and x [..., K]")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"dtype of weight, bias={weight.dtype}, {bias.dtype}: must be that of x, {x.dtype}")
    if backend_for(x, cpp=ONEDNN) == "torch":
        return gelu_linear_reference(x, weight, bias)
    return _forward_op(x, weight, bias)


def gelu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _cublaslt(x: Tensor) -> bool:
    return x.is_cuda and USE_CUBLASLT and forced_backend() != "triton"


@torch.library.custom_op("uniworld::gelu_linear", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    backend = backend_for(x, cpp=ONEDNN)
    if backend == "torch":
        return gelu_linear_reference(x, weight, bias)
    flat, weight, bias = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), bias.contiguous()
    if backend == "cpp":
        y = linear_onednn(flat, weight, bias, "gelu")
    elif _cublaslt(x):
        y = torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)  # the tanh form on CUDA
    else:
        y = x.new_empty(flat.shape[0], weight.shape[0])
        linear_epilogue_(y, flat, weight, bias, "gelu")
    return y.view(*x.shape[:-1], weight.shape[0])


@_forward_op.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("uniworld::gelu_linear_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gradient [..., N] of the pre-activation, which is computed anew."""
    flat, dy_flat = x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, dy.shape[-1]).contiguous()
    if backend_for(x, cpp=ONEDNN) == "triton" and not _cublaslt(x):
        dpre = torch.empty_like(dy_flat)
        linear_epilogue_(dpre, flat, weight.contiguous(), bias.contiguous(), "gelu_backward", dy=dy_flat)
    else:
        dpre = torch.ops.aten.gelu_backward(dy_flat, F.linear(flat, weight, bias), approximate="tanh")
    return dpre.view(dy.shape)


@_backward_op.register_fake
def _(dy, x, weight, bias):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    return linear_gradients(_backward_op(dy, x, weight, bias), x, weight, ctx.needs_input_grad)


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _make_inputs(M, K, N, dtype, device):
    x = torch.randn(1, M, K, dtype=dtype, device=device)
    weight = torch.randn(N, K, dtype=dtype, device=device) * K**-0.5
    return {"x": x, "weight": weight, "bias": torch.randn(N, dtype=dtype, device=device)}


register(
    Op(
        name="gelu_linear",
        fn=gelu_linear,
        reference=gelu_linear_reference,
        make_inputs=_make_inputs,
        cases=({"M": 1, "K": 64, "N": 32}, {"M": 37, "K": 40, "N": 70}, {"M": 65, "K": 33, "N": 5}),
        bench_cases=({"M": 4608, "K": 3072, "N": 12288},),
        bytes_moved=lambda c: 2 * (c["M"] * c["K"] + c["N"] * c["K"] + c["M"] * c["N"]),
        flops=lambda c: 2 * c["M"] * c["K"] * c["N"],
        differentiable=("x", "weight", "bias"),
        triton_builds=(
            epilogue_build("gelu", WIDE_TILE),
            epilogue_build("gelu", LARGE_TILE),
            epilogue_build("gelu", SMALL_TILE),
            epilogue_build("gelu_backward", LARGE_TILE),
            epilogue_build("gelu_backward", SMALL_TILE),
        ),
        cpp=ONEDNN,
    )
)
