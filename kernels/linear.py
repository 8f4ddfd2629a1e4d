"""linear: F.linear, with the bias inside the GEMM on a CPU in bf16.

torch fills the output with the bias there and lets the GEMM read it back, two more passes over memory.

Letters: K input channels, N output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from uniworld.kernels.linear_epilogue import ONEDNN, linear_onednn
from uniworld.kernels.registry import backend_for


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias: [..., K], [N, K], [N] -> [..., N]. Where a gradient is needed it is F.linear."""
    if fuses_bias(x, weight, bias):
        return _forward_op(x, weight, bias)
    return F.linear(x, weight, bias)


def fuses_bias(*operands: Tensor) -> bool:
    """Whether `linear` on these takes oneDNN's GEMM with a bias."""
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in operands)) and takes_onednn(*operands)


def takes_onednn(*operands: Tensor) -> bool:
    """Whether oneDNN multiplies these for us: bf16 on a CPU, and no other backend is forced."""
    if any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in operands):
        return False
    return backend_for(operands[0], cpp=ONEDNN) == "cpp"


@torch.library.custom_op("uniworld::linear", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], weight.shape[0])
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return linear_onednn(flat, weight.contiguous(), bias).view(*x.shape[:-1], weight.shape[0])


@_forward_op.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
