"""fp8_linear: a Linear on e4m3 rows and e4m3 weights, the scales of both applied to the fp32 sum.

Letters: M tokens (all leading dimensions together), K input channels, N output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from uniworld.kernels.quantize_rows import E4M3, quantize_rows_reference
from uniworld.kernels.registry import Op, forced_backend, register

MULTIPLE = 16  # of K and N: what the GEMM can do
# Tensor cores then keep the whole sum themselves, in fewer bits than fp32, instead of handing it on every few products.
USE_FAST_ACCUM = True


def fp8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """(x * x_scale) @ (weight * weight_scale).T + bias, by `torch._scaled_mm` on a GPU in bf16.

    Elsewhere the reference multiplies the same e4m3 numbers in fp32, so that only the order of the sum differs.

    Args:
        x: [..., K] e4m3; x_scale: [..., 1] fp32.
        weight: [N, K] e4m3; weight_scale: [N, 1] fp32.
        bias: [N]; its dtype is the result's.

    Returns: [..., N].

    Raises:
        ValueError: shapes do not fit, or K or N is no multiple of 16.
    """
    N, K = weight.shape
    if x.shape[-1] != K or K % MULTIPLE or N % MULTIPLE:
        raise ValueError(f"weight={(N, K)}: must be [N, K], multiples of {MULTIPLE}, for x [..., K]={tuple(x.shape)}")
    for name, scale, expected in (("x_scale", x_scale, (*x.shape[:-1], 1)), ("weight_scale", weight_scale, (N, 1))):
        if tuple(scale.shape) != expected:
            raise ValueError(f"{name}={tuple(scale.shape)}: must be {expected}")
    on_gpu = x.is_cuda or (forced_backend() == "triton" and is_fake(x))  # a fake tensor is traced as on a GPU
    if not (on_gpu and bias.dtype == torch.bfloat16 and x.dtype == E4M3) or forced_backend() == "torch":
        return fp8_linear_reference(x, x_scale, weight, weight_scale, bias)
    rows, row_scale = x.reshape(-1, K), x_scale.reshape(-1, 1)
    if rows.shape[0] == 0:
        return bias.new_empty(*x.shape[:-1], N)
    y = torch._scaled_mm(
        rows.contiguous(),
        weight.t(),
        scale_a=row_scale.contiguous(),
        scale_b=weight_scale.t(),
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=USE_FAST_ACCUM,
    )
    return y.view(*x.shape[:-1], N)


def fp8_linear_reference(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    dtype = x_scale.dtype
    product = F.linear(x.to(dtype), weight.to(dtype))  # exact products: e4m3 has 4 significant bits
    return (product * x_scale * weight_scale.t() + bias.to(dtype)).to(bias.dtype)


def _make_inputs(M, K, N, dtype, device):
    x = quantize_rows_reference(torch.randn(1, M, K, device=device) * 3)
    weight = quantize_rows_reference(torch.randn(N, K, device=device) * K**-0.5)
    bias = torch.randn(N, dtype=dtype, device=device)
    return {"x": x.values, "x_scale": x.scale, "weight": weight.values, "weight_scale": weight.scale, "bias": bias}


register(
    Op(
        name="fp8_linear",
        fn=fp8_linear,
        reference=fp8_linear_reference,
        make_inputs=_make_inputs,
        cases=({"M": 1, "K": 64, "N": 32}, {"M": 37, "K": 48, "N": 80}, {"M": 65, "K": 272, "N": 16}),
        bench_cases=(
            {"M": 4608, "K": 3072, "N": 9216},
            {"M": 4608, "K": 3072, "N": 12288},
            {"M": 4608, "K": 3072, "N": 21504},  # what reads a single block's input: q, k, v and the MLP in one
            {"M": 4608, "K": 15360, "N": 3072},
        ),
        bytes_moved=lambda c: c["M"] * c["K"] + c["N"] * c["K"] + 2 * c["M"] * c["N"],
        flops=lambda c: 2 * c["M"] * c["K"] * c["N"],
    )
)
