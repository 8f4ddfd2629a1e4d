"""joint_attention: attention over the joint [image, text] sequence; padding is neither attended nor answered.

Letters: B batch, S tokens, H heads, Dh head channels.
"""

import torch
from torch import Tensor

from uniworld.kernels.attention_backends import RAGGED, AttentionChoice, attend, choose_backend, lengths_tensor
from uniworld.kernels.attention_bf16 import attention_bf16
from uniworld.kernels.registry import Op, backend_for, register
from uniworld.kernels.varlen_attention import varlen_attention, varlen_attention_reference


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...] | None = None,
    backend: str | AttentionChoice = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, each sample among its own valid tokens only.

    Args:
        q, k, v: [B, S, H, Dh], last dimension contiguous, any other strides.
        lengths: how many leading tokens of each sample are valid, each in 1..S; None where all are.
        backend: "auto", a name in `attention_backends.BACKENDS`, or what `choose_backend` returned.

    Returns: [B, S, H, Dh], dtype of q; rows past a sample's length are zero. A batch of unequal lengths equals each
    sample alone: "auto" may take another backend for it (`RAGGED_ORDER`), and one without a call for unequal lengths
    runs once a sample, as all but "cpu_bf16" do where gradients are needed. The gradient is the backend's own;
    "triton" has none.

    Raises:
        ValueError: shapes or lengths do not fit, the backend cannot run here, or "triton" would need a gradient.
    """
    lengths = _check(q, k, v, lengths)
    name = backend.name if isinstance(backend, AttentionChoice) else _name(backend, q.device, q.dtype, q.shape[-1])
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if name == "triton":
        if needs_gradient:
            raise ValueError("attention='triton': has no backward pass; choose another backend for training")
        return varlen_attention(q, k, v, lengths_tensor(lengths or (q.shape[1],) * q.shape[0], q.device))
    if name == "cpu_bf16":
        return attention_bf16(q, k, v, lengths)
    if lengths is None:
        return attend(name, q, k, v)
    if len(set(lengths)) > 1 and not needs_gradient:
        ragged = backend.ragged if isinstance(backend, AttentionChoice) else _ragged(backend, q)
        if ragged == "triton" and backend_for(q) == "triton":
            return varlen_attention(q, k, v, lengths_tensor(lengths, q.device))
        if ragged in RAGGED:
            out = RAGGED[ragged](q, k, v, lengths)
            for b, n in enumerate(lengths):
                out[b, n:] = 0
            return out
    return _attend_prefixes(name, q, k, v, lengths)


def joint_attention_reference(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
    lengths = lengths or (q.shape[1],) * q.shape[0]
    return varlen_attention_reference(q, k, v, torch.tensor(lengths, device=q.device))


@torch.compiler.assume_constant_result
def _name(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return choose_backend(requested, device, dtype, head_dim).name


@torch.compiler.assume_constant_result
def _ragged(requested: str, q: Tensor) -> str:
    return choose_backend(requested, q.device, q.dtype, q.shape[-1]).ragged


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Refuse what does not fit; returns None for lengths that leave no padding."""
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"k, v={tuple(k.shape)}, {tuple(v.shape)}: must equal q, {tuple(q.shape)} {q.dtype}")
    if lengths is None:
        return None
    B, S = q.shape[:2]
    if len(lengths) != B or not all(1 <= n <= S for n in lengths):
        raise ValueError(f"lengths={tuple(lengths)}: must be {B} numbers in 1..{S}")
    return None if all(n == S for n in lengths) else tuple(lengths)


def _attend_prefixes(name: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One call for all samples where their lengths are equal, else one a sample; zeros after each prefix."""
    S = q.shape[1]
    if len(set(lengths)) == 1:
        n = lengths[0]
        out = attend(name, q[:, :n], k[:, :n], v[:, :n])
        return torch.cat([out, out.new_zeros(len(lengths), S - n, *q.shape[2:])], dim=1)
    pieces = []
    # unbound, since the gradient of a slice of the batch is as large as the batch, and there is one for each sample
    for *sample, n in zip(q.unbind(), k.unbind(), v.unbind(), lengths):
        pieces.append(attend(name, *(x[None, :n] for x in sample))[0])
        if n < S:
            pieces.append(q.new_zeros(S - n, *q.shape[2:]))
    return torch.cat(pieces).view(q.shape)


def _make_inputs(B, S, H, Dh, ragged, dtype, device):
    """q, k, v as views of one [B, S, 3, H, Dh] projection; `ragged` shortens each sample by that much more."""
    q, k, v = torch.randn(B, S, 3, H, Dh, dtype=dtype, device=device).unbind(2)
    lengths = tuple(S - b * ragged for b in range(B)) if ragged else None
    return {"q": q, "k": k, "v": v, "lengths": lengths}


register(
    Op(
        name="joint_attention",
        fn=joint_attention,
        reference=joint_attention_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "S": 1, "H": 1, "Dh": 16, "ragged": 0},
            {"B": 2, "S": 65, "H": 3, "Dh": 24, "ragged": 0},
            {"B": 2, "S": 81, "H": 2, "Dh": 64, "ragged": 0},
            {"B": 3, "S": 77, "H": 2, "Dh": 40, "ragged": 33},
        ),
        bench_cases=(
            {"B": 1, "S": 4608, "H": 24, "Dh": 128, "ragged": 0},
            {"B": 4, "S": 2624, "H": 24, "Dh": 128, "ragged": 320},
        ),
        bytes_moved=lambda c: 2 * c["H"] * c["Dh"] * sum(4 * c["S"] - 3 * b * c["ragged"] for b in range(c["B"])),
        flops=lambda c: sum(4 * c["H"] * (c["S"] - b * c["ragged"]) ** 2 * c["Dh"] for b in range(c["B"])),
        differentiable=("q", "k", "v"),
    )
)
