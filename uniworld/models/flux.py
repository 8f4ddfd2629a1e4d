"""The FLUX.1 diffusion transformer, on the fused ops.

Parameter names are those of diffusers' `FluxTransformer2DModel`, except that q, k and v are fused by rows
(`attn.to_qkv`, `attn.add_qkv_proj`). Names `img, txt, vec, pe` follow black-forest-labs/flux.

Letters: B batch, N sampling steps, L tokens of a stream, D channels.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniworld.kernels.adaln_modulate import adaln_modulate
from uniworld.kernels.attention_backends import AttentionChoice
from uniworld.kernels.gate_residual import gate_residual, gate_residual_adaln
from uniworld.models.blocks import AdaLinear, AttentionPlan, DoubleBlock, Modulation, Rope, SingleBlock
from uniworld.models.quantized import Normed, adaln_for, gate_adaln_for

ROPE_THETA = 10_000
TIME_FACTOR = 1000.0  # the model is given sigma in [0, 1] and embeds 1000 * sigma
SINUSOID_DIM = 256


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Sizes of the DiT, named as in diffusers' `transformer/config.json`; the defaults are FLUX.1-dev."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    out_channels: int | None = None

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={self.axes_dims_rope}: must sum to attention_head_dim={self.attention_head_dim}"
            )
        for name in ("num_layers", "num_single_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_modulations(self) -> int:
        """Vectors of width D that one pass is modulated by."""
        double, single = DoubleBlock.num_modulations, SingleBlock.num_modulations
        return self.num_layers * double + self.num_single_layers * single + 2

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "FluxConfig":
        """From diffusers' config; keys that start with "_" and `patch_size` (which must be 1) are not sizes of ours."""
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size={config['patch_size']}: must be 1, latents are packed before the DiT")
        known = {f.name for f in fields(cls)}
        picked = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
        return cls(**picked)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear from a conditioning vector to D."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """Sum of the embeddings of timestep, guidance and pooled text."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(SINUSOID_DIM, config.dim)
        if config.guidance_embeds:
            self.guidance_embedder = MLPEmbedder(SINUSOID_DIM, config.dim)
        self.text_embedder = MLPEmbedder(config.pooled_projection_dim, config.dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """timestep [..., B] or [N, 1], guidance [B] and pooled [B, P] -> vec, broadcast to [..., B, D]."""
        vec = self.timestep_embedder(sinusoid(timestep).to(pooled.dtype)) + self.text_embedder(pooled)
        if guidance is not None:
            vec = vec + self.guidance_embedder(sinusoid(guidance).to(pooled.dtype))
        return vec


def sinusoid(t: Tensor) -> Tensor:
    """cos and sin of 1000 t at 128 frequencies: [...] -> [..., 256], in fp32 (fp64 stays fp64)."""
    t = t if t.dtype == torch.float64 else t.float()
    half = SINUSOID_DIM // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = TIME_FACTOR * t[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PassPlan(NamedTuple):
    """What the pieces of one pass share; made by `FluxTransformer.plan`."""

    num_img: int
    """Of the tokens that are here; with `attention.exchange` others hold more."""
    doubles: list[tuple[Modulation, Modulation, Modulation, Modulation]]
    singles: list[Modulation]
    output: tuple[Tensor, Tensor]  # scale and shift of the output head, each [B, D]
    attention: AttentionPlan


class Streams(NamedTuple):
    """Both residual streams between two double blocks, plain and as the next block takes them (None behind the last).

    img, img_normed: [B, L_img, D]; txt, txt_normed: [B, L_txt, D].
    """

    img: Tensor
    txt: Tensor
    img_normed: Normed | None
    txt_normed: Normed | None


class FluxTransformer(nn.Module):
    """FLUX.1 DiT: `forward` is one prediction; samplers call its pieces so as to prepare a request once.

    A request is prepared by `embed_txt`, `modulation` (all steps in one table) and `rope`; each step is `denoise`.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        self.attention_backend: str | AttentionChoice = "auto"
        dim, heads = config.dim, config.num_attention_heads
        self.x_embedder = nn.Linear(config.in_channels, dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, dim)
        self.time_text_embed = TimeTextEmbed(config)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(dim, heads) for _ in range(config.num_single_layers))
        self.norm_out = AdaLinear(dim, 2)
        self.proj_out = nn.Linear(dim, config.out_channels or config.in_channels)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Predict the velocity eps - x.

        Args:
            img: packed noisy latents [B, L_img, in_channels].
            txt: text-side states [B, L_txt, joint_attention_dim], padded on the right.
            pooled: pooled text [B, pooled_projection_dim].
            timestep: sigma in [0, 1], [B].
            guidance: guidance scale [B]; None where the model has no guidance embedding.
            img_ids: rope positions [L_img, len(axes_dims_rope)].
            txt_lengths: valid text tokens of each sample, None where there is no padding.

        Returns: [B, L_img, out_channels].
        """
        modulation = self.modulation(timestep, guidance, pooled)
        return self.denoise(img, self.embed_txt(txt), modulation, self.rope(img_ids), txt_lengths)

    def embed_txt(self, txt: Tensor) -> Tensor:
        """[B, L_txt, joint_attention_dim] -> [B, L_txt, D]; the same for every step of a request."""
        return self.context_embedder(txt)

    def modulation(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """All adaLN vectors: they depend on timestep, guidance and pooled text only, so one table serves a request.

        Args:
            timestep: [B] for one pass, or [N, 1] for all N steps of a request.
            guidance: [B] or None; pooled: [B, P].

        Returns: [B, num_modulations * D], or [N, B, num_modulations * D]; row n is what `denoise` takes.
        """
        if (guidance is None) == self.config.guidance_embeds:
            state = "is required" if guidance is None else "must be None"
            raise ValueError(f"guidance {state}: the checkpoint's guidance_embeds is {self.config.guidance_embeds}")
        vec = F.silu(self.time_text_embed(timestep, guidance, pooled))
        return torch.cat([linear(vec) for linear in self.modulation_linears()], dim=-1)

    def modulation_linears(self) -> list[nn.Linear]:
        """What makes the table of `modulation`, in its order: over a quarter of FLUX.1-dev's parameters."""
        linears = [linear for b in self.transformer_blocks for linear in (b.norm1.linear, b.norm1_context.linear)]
        linears += [b.norm.linear for b in self.single_transformer_blocks]
        return [*linears, self.norm_out.linear]

    def rope(self, img_ids: Tensor) -> Rope:
        """Rotary tables of the positions img_ids [L_img, axes]: angles in fp64, tables in fp32."""
        angles = []
        for axis, dim in enumerate(self.config.axes_dims_rope):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=img_ids.device) / dim
            angles.append(img_ids[:, axis, None].double() * ROPE_THETA**-exponents)
        joined = torch.cat(angles, dim=-1)
        return Rope(joined.cos().float(), joined.sin().float())

    def denoise(
        self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, txt_lengths: tuple[int, ...] | None = None
    ) -> Tensor:
        """One pass over prepared inputs.

        Args:
            img: packed noisy latents [B, L_img, in_channels].
            txt: from `embed_txt` [B, L_txt, D]; modulation: one row of the table [B, num_modulations * D].
            pe: from `rope`; txt_lengths: as in `forward`.

        Returns: velocity [B, L_img, out_channels].
        """
        plan = self.plan(img.shape[1], modulation, pe, txt_lengths)
        return self.remaining_blocks(self.first_block(self.x_embedder(img), txt, plan), plan)[1]

    def plan(self, num_img: int, modulation: Tensor, pe: Rope, txt_lengths: tuple[int, ...] | None = None) -> PassPlan:
        """What the pieces of one pass share; arguments as in `denoise`.

        `denoise` is `first_block`, then `remaining_blocks`; a sampler that replaces the latter ends with `output`.
        """
        lengths = None if txt_lengths is None else tuple(num_img + n for n in txt_lengths)
        return PassPlan(num_img, *self._split(modulation), AttentionPlan(pe, lengths, self.attention_backend))

    def first_block(self, img: Tensor, txt: Tensor, plan: PassPlan) -> Streams:
        """The first double block; img: from `x_embedder` [B, L_img, D]; txt: as in `denoise`."""
        img_attn, _, txt_attn, _ = plan.doubles[0]
        attn = self.transformer_blocks[0].attn
        img_normed = adaln_for((attn.to_qkv,), img, img_attn.scale, img_attn.shift)
        txt_normed = adaln_for((attn.add_qkv_proj,), txt, txt_attn.scale, txt_attn.shift)
        return self._double_block(0, Streams(img, txt, img_normed, txt_normed), plan)

    def remaining_blocks(self, streams: Streams, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """What follows `first_block`: the image's stream behind the last block [B, L_img, D], and the velocity."""
        for i in range(1, len(self.transformer_blocks)):
            streams = self._double_block(i, streams, plan)
        return self._single_blocks(torch.cat([streams.img, streams.txt], dim=1), plan)

    def output(self, img: Tensor, plan: PassPlan) -> Tensor:
        """The velocity [B, L_img, out_channels] of an image stream as it is behind the last block [B, L_img, D]."""
        scale, shift = plan.output
        return self.proj_out(adaln_modulate(img, scale, shift))

    def _split(self, modulation: Tensor):
        """Views of one row of the table: 4 triples a double block, 1 a single block, (scale, shift) of the output."""
        vectors = modulation.split(self.config.dim, dim=-1)
        triples = [Modulation(*vectors[i : i + 3]) for i in range(0, len(vectors) - 2, 3)]
        num_double = 4 * self.config.num_layers
        doubles = [tuple(triples[i : i + 4]) for i in range(0, num_double, 4)]
        return doubles, triples[num_double:], vectors[-2:]

    def _double_block(self, index: int, streams: Streams, plan: PassPlan) -> Streams:
        """One double block with its last gated add, fused with the norms that the next one starts with."""
        img, txt, img_update, txt_update = self.transformer_blocks[index](*streams, plan.doubles[index], plan.attention)
        _, img_mlp, _, txt_mlp = plan.doubles[index]
        if index + 1 == len(self.transformer_blocks):  # the joint sequence is normalized instead
            return Streams(
                gate_residual(img, img_update, img_mlp.gate), gate_residual(txt, txt_update, txt_mlp.gate), None, None
            )
        img_next, _, txt_next, _ = plan.doubles[index + 1]
        attn = self.transformer_blocks[index + 1].attn
        img, img_normed = gate_adaln_for((attn.to_qkv,), img, img_update, img_mlp.gate, img_next.scale, img_next.shift)
        txt, txt_normed = gate_adaln_for(
            (attn.add_qkv_proj,), txt, txt_update, txt_mlp.gate, txt_next.scale, txt_next.shift
        )
        return Streams(img, txt, img_normed, txt_normed)

    def _single_blocks(self, x: Tensor, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """Run the single blocks, and the output head on the image rows: see `remaining_blocks`."""
        blocks, singles = self.single_transformer_blocks, plan.singles
        normed = adaln_for(blocks[0].readers, x, singles[0].scale, singles[0].shift)
        for i, block in enumerate(blocks):
            update, gate = block(normed, plan.attention), singles[i].gate
            if i + 1 < len(blocks):
                following = singles[i + 1]
                x, normed = gate_adaln_for(blocks[i + 1].readers, x, update, gate, following.scale, following.shift)
        x, normed = gate_residual_adaln(x[:, : plan.num_img], update[:, : plan.num_img], gate, *plan.output)
        return x, self.proj_out(normed)
