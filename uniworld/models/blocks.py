"""The two kinds of block of the FLUX DiT, on the fused ops.

A block receives its streams already normalized and modulated, and returns its last update without adding it:
the residual add and gate are fused with the norm and modulation of whatever comes next (`FluxTransformer.denoise`).

Letters: B batch, L tokens of one stream, S tokens of the joint sequence (image first), D channels, H heads.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from uniworld.kernels.attention_backends import AttentionChoice
from uniworld.kernels.joint_attention import joint_attention
from uniworld.kernels.linear import linear
from uniworld.kernels.qk_norm_rope import qk_norm_rope
from uniworld.kernels.quantize_rows import quantize_rows
from uniworld.models.quantized import (
    Fp8Linear,
    Normed,
    gate_adaln_for,
    gelu_of_linear,
    joined,
    linear_of_both,
    linear_with_gelu,
    takes_fp8,
)


class Rope(NamedTuple):
    """Rotary tables of the image tokens, each [L_img, head_dim / 2] fp32; text tokens are not rotated."""

    cos: Tensor
    sin: Tensor


class Modulation(NamedTuple):
    """One adaLN triple, each [B, D]: normed * (1 + scale) + shift goes in, gate scales what comes out."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class HeadExchange(Protocol):
    """Sequence parallelism: each process holds some tokens of every head, and attends with some heads to all tokens."""

    def own(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of both streams, [B, L, C] each -> those of this process."""

    def gather_img(self, x: Tensor) -> Tensor:
        """Own image tokens [B, L_own, C] -> those of all processes [B, L, C]."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes, the same bits on each."""

    def scatter_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own tokens of all heads, each [B, S_own, H, Dh] -> all tokens of own heads [B, S, H_own, Dh]."""

    def gather_heads(self, x: Tensor) -> Tensor:
        """The way back, [B, S, H_own, Dh] -> [B, S_own, H, Dh]."""


class AttentionPlan(NamedTuple):
    """What every attention call of a pass shares: the tables, the valid lengths and the backend."""

    rope: Rope
    lengths: tuple[int, ...] | None
    backend: str | AttentionChoice
    exchange: HeadExchange | None = None
    """With others for the tokens that are not here; `lengths` then count those of all."""


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """`joint_attention` of one layer, [B, S, H, Dh].

    A padded batch leaves the compiled graph here: its lengths are Python numbers, and would be compiled anew each time.
    """
    if plan.exchange is not None:
        return _attend_across(q, k, v, plan)
    if plan.lengths is None:
        return joint_attention(q, k, v, backend=plan.backend)
    return _attend_padded(q, k, v, plan)


@torch.compiler.disable
def _attend_across(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    q, k, v = plan.exchange.scatter_heads(q, k, v)
    return plan.exchange.gather_heads(joint_attention(q, k, v, lengths=plan.lengths, backend=plan.backend))


@torch.compiler.disable
def _attend_padded(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    return joint_attention(q, k, v, lengths=plan.lengths, backend=plan.backend)


class Linear(nn.Linear):
    """nn.Linear on `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class AdaLinear(nn.Module):
    """Holds the linear that makes a block's modulation (diffusers' `norm1`, `norm`, `norm_out`)."""

    def __init__(self, dim: int, num_chunks: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_chunks * dim)


class RMSScale(nn.Module):
    """The learned scale of an RMSNorm over the head channels; the norm itself is inside `qk_norm_rope`."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class JointAttention(nn.Module):
    """Projections of a double block: image (`to_*`) and text (`add_*`) streams, q, k and v fused by rows."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.norm_q, self.norm_k = RMSScale(head_dim), RMSScale(head_dim)
        self.norm_added_q, self.norm_added_k = RMSScale(head_dim), RMSScale(head_dim)
        self.to_qkv = Linear(dim, 3 * dim)
        self.add_qkv_proj = Linear(dim, 3 * dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.to_add_out = Linear(dim, dim)

    def forward(self, img: Normed, txt: Normed, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Normalized streams [B, L_img, D], [B, L_txt, D] -> their attention updates, same shapes."""
        img_qkv = self.to_qkv(img)
        q, k, v = qk_norm_rope(
            img_qkv,
            self.norm_q.weight,
            self.norm_k.weight,
            plan.rope.cos,
            plan.rope.sin,
            self.add_qkv_proj(txt),
            self.norm_added_q.weight,
            self.norm_added_k.weight,
            num_heads=self.num_heads,
        )
        joint = attend(q, k, v, plan).flatten(2)
        num_img = img_qkv.shape[1]
        img_update, txt_update = joint.split([num_img, joint.shape[1] - num_img], dim=1)
        return self.to_out[0](img_update), self.to_add_out(txt_update)


class SingleAttention(nn.Module):
    """Projections of a single block over the joint sequence; its output projection is the block's `proj_out`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_k = RMSScale(dim // num_heads), RMSScale(dim // num_heads)
        self.to_qkv = Linear(dim, 3 * dim)

    def forward(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        """`to_qkv` of the normalized joint sequence [B, S, 3 D] -> attention output before its projection [B, S, D]."""
        q, k, v = qk_norm_rope(
            qkv,
            self.norm_q.weight,
            self.norm_k.weight,
            plan.rope.cos,
            plan.rope.sin,
            num_heads=self.num_heads,
        )
        return attend(q, k, v, plan).flatten(2)


class GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Normed) -> Tensor:
        return gelu_of_linear(self.proj, x)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; `net.1` is the dropout of diffusers' layout, which holds nothing."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Normed) -> Tensor:
        first, second = self.net[0], self.net[2]
        if takes_fp8(first.proj, second):
            return second(quantize_rows(None, gelu_of=first.proj(x)))
        return second(first(x))


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, joined in attention (MM-DiT)."""

    num_modulations = 12  # two triples for the image stream, then two for the text stream

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = AdaLinear(dim, 6)
        self.norm1_context = AdaLinear(dim, 6)
        self.attn = JointAttention(dim, num_heads)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_normed: Normed,
        txt_normed: Normed,
        modulation: tuple[Modulation, Modulation, Modulation, Modulation],
        plan: AttentionPlan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One block up to, and without, its last gated add.

        Args:
            img, txt: residual streams [B, L_img, D], [B, L_txt, D].
            img_normed, txt_normed: the same, normalized and modulated by the first and third triple.
            modulation: (image attention, image MLP, text attention, text MLP).

        Returns: (img, txt, img_update, txt_update); the caller adds `gate * update`.
        """
        img_attn_mod, img_mlp_mod, txt_attn_mod, txt_mlp_mod = modulation
        img_attn, txt_attn = self.attn(img_normed, txt_normed, plan)
        img, img_normed = gate_adaln_for(
            (self.ff.net[0].proj,), img, img_attn, img_attn_mod.gate, img_mlp_mod.scale, img_mlp_mod.shift
        )
        txt, txt_normed = gate_adaln_for(
            (self.ff_context.net[0].proj,), txt, txt_attn, txt_attn_mod.gate, txt_mlp_mod.scale, txt_mlp_mod.shift
        )
        return img, txt, self.ff(img_normed), self.ff_context(txt_normed)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over the joint sequence (ViT-22B style)."""

    num_modulations = 3

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm = AdaLinear(dim, 3)
        self.attn = SingleAttention(dim, num_heads)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)
        self.joint: Fp8Linear | None = None

    def join(self) -> None:
        """Let one product take the place of the two that read the normalized sequence, where both are in e4m3.

        GELU is then part of the next quantization. With dense weights it stands in the epilogue of `proj_mlp`'s
        product, which q, k and v must not pass through.
        """
        if takes_fp8(*self.readers):
            self.joint, self.attn.to_qkv, self.proj_mlp = joined(*self.readers)

    @property
    def readers(self) -> tuple[nn.Module, nn.Module]:
        """The linears that read the normalized sequence."""
        return self.attn.to_qkv, self.proj_mlp

    def forward(self, normed: Normed, plan: AttentionPlan) -> Tensor:
        """Normalized joint sequence [B, S, D] -> the block's update [B, S, D]; the caller adds `gate * update`."""
        if self.joint is None or not takes_fp8(*self.readers):  # LoRA may stand beside one of them
            return self.forward_apart(normed, plan)
        qkv, hidden = self.joint(normed).split([reader.out_features for reader in self.readers], dim=-1)
        return linear_with_gelu(self.attn(qkv, plan), hidden, self.proj_out)

    def forward_apart(self, normed: Normed, plan: AttentionPlan) -> Tensor:
        """`forward` with a product of each of the `readers`."""
        attended = self.attn(self.attn.to_qkv(normed), plan)
        return linear_of_both(attended, self.proj_mlp, normed, self.proj_out)
