"""attention_bf16: the "cpu_bf16" backend of joint_attention, in C++ for CPUs with AVX512-BF16 (AMD Zen 4 and 5).

torch's own kernel multiplies bf16 fast only on CPUs with AMX.

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


def attention_bf16(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v; products of bf16 summed in fp32, softmax in fp32, its weights rounded to bf16.

    Args:
        q, k, v: [B, S, H, Dh] bf16, Dh a multiple of 32 and at most 256, last dimension contiguous, any other strides.
        lengths: how many leading tokens of each sample are valid, each in 1..S; None where all are. The padding is not
            read, and gets no gradient.

    Returns: [B, S, H, Dh] bf16; rows past a sample's length are zero.
    """
    return _forward_op(q, k, v, lengths)[0]


@torch.library.custom_op("uniworld::attention_bf16", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, Dh] bf16, lse [B, H, S] fp32: the base-2 logarithm of each query's sum of exponentials)."""
    B, S, H, _ = q.shape
    out, lse = _zeros_past(q, lengths), torch.zeros(B, H, S)
    if not q.numel():
        return out, lse
    workspace = torch.empty(extension.core().attention_bf16_workspace(*q.shape), dtype=torch.uint8)
    q, k, v = (channels_last(t) for t in (q, k, v))
    valid = _lengths_tensor(lengths)
    extension.core().attention_bf16(
        *_strided(q), *_strided(k), *_strided(v), _address(valid), out.data_ptr(), lse.data_ptr(), workspace.data_ptr(),
        *q.shape,
    )  # fmt: skip
    return out, lse


@_forward_op.register_fake
def _(q, k, v, lengths):
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("uniworld::attention_bf16_backward", mutates_args=())
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, S, H, Dh] bf16; weights and the gradient of scores are fp32, and rounded to be multiplied."""
    dq, dk, dv = (_zeros_past(q, lengths) for _ in range(3))
    if not q.numel():
        return dq, dk, dv
    dout, q, k, v, out = (channels_last(t) for t in (dout, q, k, v, out))
    valid = _lengths_tensor(lengths)
    extension.core().attention_bf16_backward(
        *(_strided(t) for t in (q, k, v, dout, out)), lse.data_ptr(), _address(valid),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), *q.shape,
    )  # fmt: skip
    return dq, dk, dv


@_backward_op.register_fake
def _(dout, q, k, v, out, lse, lengths):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _zeros_past(like: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """[B, S, H, Dh] contiguous, uninitialized but for zeros past each length."""
    out = torch.empty(like.shape, dtype=like.dtype)
    for sample, length in enumerate(lengths or ()):
        out[sample, length:] = 0
    return out


def _lengths_tensor(lengths: Sequence[int] | None) -> Tensor | None:
    return None if lengths is None else torch.tensor(lengths, dtype=torch.int64)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of batch, token and head."""
    return x.data_ptr(), *x.stride()[:3]


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.lengths = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    return *_backward_op(dout, *ctx.saved_tensors, ctx.lengths), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
