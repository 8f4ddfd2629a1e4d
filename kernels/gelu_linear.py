"""gelu_linear: GELU (tanh form) of a Linear, with bias and GELU in the GEMM's epilogue.

Letters: M tokens (all leading dimensions together), K input channels, N output channels.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniworld.kernels.gelu import gelu
from uniworld.kernels.linear_epilogue import (
    LARGE_TILE,
    ONEDNN,
    SMALL_TILE,
    WIDE_TILE,
    epilogue_build,
    linear_epilogue_,
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

    Returns: [..., N], dtype of x; accumulation, bias and GELU are fp32. Where a gradient is needed the two run one
    after the other and the pre-activation is kept: a pass over memory costs less than the GEMM that would make it anew.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.shape != (bias.shape[0], x.shape[-1]):
        expected = (bias.shape[0], x.shape[-1])
        raise ValueError(f"weight={tuple(weight.shape)}: must be {expected} for bias [N] and x [..., K]")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"dtype of weight, bias={weight.dtype}, {bias.dtype}: must be that of x, {x.dtype}")
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    if needs_gradient:
        return gelu(F.linear(x, weight, bias))
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


@register_flop_formula(torch.ops.uniworld.gelu_linear)
def _(x_shape, weight_shape, *args, **kwargs) -> int:
    """For `torch.utils.flop_counter`: the matrix product."""
    return 2 * prod(x_shape) * weight_shape[0]


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
        ),
        cpp=ONEDNN,
    )
)
