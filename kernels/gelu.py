"""gelu: GELU in its tanh form with a gradient, in C++ on the CPU; elsewhere torch's own.

Hendrycks and Gimpel, 2016, section 2. torch's CPU kernel calls the C library's tanh.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from uniworld.kernels import extension
from uniworld.kernels.registry import DTYPE_CODES, backend_for


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), any shape; fp32 inside, dtype of x."""
    if x.is_cuda or backend_for(x, cpp="gelu") != "cpp":
        return F.gelu(x, approximate="tanh")
    return _forward_op(x)


@torch.library.custom_op("uniworld::gelu", mutates_args=())
def _forward_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    extension.core().gelu(DTYPE_CODES[x.dtype], x.data_ptr(), out.data_ptr(), *_rows(x))
    return out


@_forward_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@torch.library.custom_op("uniworld::gelu_backward", mutates_args=())
def _backward_op(dout: Tensor, x: Tensor) -> Tensor:
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    extension.core().gelu_backward(DTYPE_CODES[x.dtype], dout.data_ptr(), x.data_ptr(), dx.data_ptr(), *_rows(x))
    return dx


@_backward_op.register_fake
def _(dout, x):
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> tuple[int, int]:
    """The shape in which threads share the work."""
    columns = x.shape[-1] if x.ndim else 1
    return x.numel() // max(columns, 1), columns


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return _backward_op(dout, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
