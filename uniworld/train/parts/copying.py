"""More heads that copy, for a DiT in which one does.

What pictures show reaches the image tokens where a head of the first block looks from each place at the semantic token
of the same place. In `tiny` one head of seven learned to, with 96 % of its attention where things are, and all others
leave what they see unsharp. So the 64 latents of a patch had to go through the 32 numbers of its values: read from
these by a linear map, latents of things had a squared error of 0.27, and from all that the token says 0.07.

Here other heads take over its queries and keys. Their values start as the linear map of the tokens that gives what the
first one's lack, their outputs at zero, so that nothing else changes before they learn.

Letters: B pictures, T tokens of a picture, D channels, Dh channels of a head, C packed latent channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uniworld.kernels.qk_norm_rope import qk_norm_rope
from uniworld.models.blocks import AttentionPlan, JointAttention

RIDGE = 1e-5  # of the mean square of what is read
WEAKEST = 0.1  # of the strongest direction's deviation: weaker ones are not made louder than that allows


class Seen(NamedTuple):
    """What the first block's attention was given: normalized streams [B, T, D] each, and its plan."""

    img: Tensor
    txt: Tensor
    plan: AttentionPlan


@torch.no_grad()
def add_copying_heads(attn: JointAttention, loss: Callable[[], Tensor], wanted: Tensor, num: int) -> list[int]:
    """Let `num` more heads copy, those without which the loss rises least.

    Args:
        attn: of the first block.
        loss: a pass of the DiT in pure noise, of pictures drawn from their semantic states and from nothing else, so
            that the T tokens of both streams are of the same places.
        wanted: the packed latents of these pictures [B, T, C].

    Returns: the heads that copy now, the one that did first.
    Raises: ValueError where there are not so many other heads.
    """
    if not 0 < num < attn.num_heads:
        raise ValueError(f"copying_heads={num}: must be from 1 to {attn.num_heads - 1}")
    seen = _seen(attn, loss)
    copying = int(share_at_own_place(attn, seen).argmax())
    others = [head for head in range(attn.num_heads) if head != copying]
    costs = {head: _loss_without(attn, head, loss) for head in others}
    taken = sorted(others, key=costs.get)[:num]
    weight, bias = _missing_values(attn, copying, seen.txt.flatten(0, 1), wanted.flatten(0, 1), num)
    dim = attn.to_out[0].in_features
    for number, head in enumerate(taken):
        own, source = _rows(attn, head), _rows(attn, copying)
        for linear in (attn.to_qkv, attn.add_qkv_proj):
            for part in (linear.weight, linear.bias):
                for rows in (part[:dim], part[dim : 2 * dim]):  # queries, keys
                    rows[own] = rows[source].clone()
        attn.add_qkv_proj.weight[2 * dim :][own] = weight[number::num].to(attn.add_qkv_proj.weight)
        attn.add_qkv_proj.bias[2 * dim :][own] = bias[number::num].to(attn.add_qkv_proj.bias)
        _silence(attn, head)
    return [copying, *taken]


def share_at_own_place(attn: JointAttention, seen: Seen) -> Tensor:
    """How much of the image tokens' attention goes to the text token of the same place, of each head [H]."""
    q, k, _ = qk_norm_rope(
        attn.to_qkv(seen.img),
        attn.norm_q.weight,
        attn.norm_k.weight,
        seen.plan.rope.cos,
        seen.plan.rope.sin,
        attn.add_qkv_proj(seen.txt),
        attn.norm_added_q.weight,
        attn.norm_added_k.weight,
        num_heads=attn.num_heads,
    )
    num = seen.img.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :num].float(), k.float()) * q.shape[-1] ** -0.5
    to_txt = scores.softmax(-1)[..., num:]
    return to_txt.diagonal(dim1=-2, dim2=-1).mean((0, 2))


def _seen(attn: JointAttention, loss: Callable[[], Tensor]) -> Seen:
    found = []
    hook = attn.register_forward_pre_hook(lambda _, given: found.append(Seen(*given)))
    try:
        loss()
    finally:
        hook.remove()
    return found[0]


def _loss_without(attn: JointAttention, head: int, loss: Callable[[], Tensor]) -> float:
    outputs = [attn.to_out[0].weight, attn.to_add_out.weight]
    kept = [weight.clone() for weight in outputs]
    _silence(attn, head)
    found = float(loss())
    for weight, old in zip(outputs, kept):
        weight.copy_(old)
    return found


def _silence(attn: JointAttention, head: int) -> None:
    for linear in (attn.to_out[0], attn.to_add_out):
        linear.weight[:, _rows(attn, head)] = 0


def _rows(attn: JointAttention, head: int) -> slice:
    width = attn.to_out[0].in_features // attn.num_heads
    return slice(head * width, (head + 1) * width)


def _missing_values(attn: JointAttention, copying: int, txt: Tensor, wanted: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Weight [num Dh, D] and bias [num Dh] of values that hold what those of `copying` lack, the most first."""
    dim, rows = attn.to_out[0].in_features, _rows(attn, copying)
    txt, wanted = txt.double(), wanted.double()
    weight, bias = (part[2 * dim :][rows].double() for part in (attn.add_qkv_proj.weight, attn.add_qkv_proj.bias))
    values = txt @ weight.T + bias
    lacking = wanted - _ones(values) @ _fitted(values, wanted)
    fit = _fitted(txt, lacking)
    read = _ones(txt) @ fit
    mean, scale = read.mean(0), values.square().mean().sqrt()
    lam, directions = torch.linalg.eigh((read - mean).T @ (read - mean) / len(read))
    order = lam.argsort(descending=True)[: num * len(weight)]
    deviations = lam[order].clamp(min=float(lam.max()) * WEAKEST**2).sqrt()
    directions = directions[:, order] * (scale / deviations)
    padded = num * len(weight) - directions.shape[1]  # a head more than the latents need has nothing to say yet
    directions = torch.nn.functional.pad(directions, (0, padded))
    return (fit[:-1] @ directions).T, (fit[-1] - mean) @ directions


def _ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def _fitted(x: Tensor, y: Tensor) -> Tensor:
    """The linear map with a constant, [D + 1, C], of x [N, D] to y [N, C]: ridge regression."""
    x = _ones(x)
    gram = x.T @ x
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), x.T @ y)
