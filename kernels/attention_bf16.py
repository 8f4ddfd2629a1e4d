"""attention_bf16: the "cpu_bf16" backend of joint_attention, in C++ for CPUs with AVX512-BF16 (AMD Zen 4 and 5).

torch's own kernel multiplies bf16 fast only on CPUs with AMX. No backward pass.

Letters: B batch, S tokens, H heads, Dh head channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from uniworld.kernels import extension
from uniworld.kernels.registry import channels_last

WIDEST_HEAD = 256


def why_missing() -> str:
    """Why this backend cannot run on this machine's CPU; "" where it can."""
    if not extension.has("attention_bf16"):
        return extension.MISSING or "the C++ core was built without it: needs x86-64 and GCC 10 or Clang"
    return "" if "avx512_bf16" in extension.CPU_FEATURES else "needs a CPU with AVX512-BF16"


def why_unsuited(dtype: torch.dtype, head_dim: int) -> str:
    """Why it cannot serve these tensors; "" where it can."""
    if dtype != torch.bfloat16:
        return f"needs bfloat16, not {dtype}"
    if head_dim % 32 or head_dim > WIDEST_HEAD:
        return f"needs a head_dim that is a multiple of 32 and at most {WIDEST_HEAD}, not {head_dim}"
    return ""


@torch.library.custom_op("uniworld::attention_bf16", mutates_args=())
def attention_bf16(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v; products of bf16 summed in fp32, softmax in fp32, its weights rounded to bf16.

    Args:
        q, k, v: [B, S, H, Dh] bf16, Dh a multiple of 32 and at most 256, last dimension contiguous, any other strides.
        lengths: how many leading tokens of each sample are valid, each in 1..S; None where all are. The padding is not
            read.

    Returns: [B, S, H, Dh] bf16; rows past a sample's length are undefined. No gradient.
    """
    q, k, v = (channels_last(t) for t in (q, k, v))
    out = q.new_empty(q.shape)
    if not q.numel():
        return out
    workspace = torch.empty(extension.core().attention_bf16_workspace(*q.shape), dtype=torch.uint8)
    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    extension.core().attention_bf16(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
        0 if valid is None else valid.data_ptr(), out.data_ptr(), workspace.data_ptr(), *q.shape,
    )  # fmt: skip
    return out


@attention_bf16.register_fake
def _(q, k, v, lengths=None):
    return q.new_empty(q.shape)
