"""The module that DeepSpeed wraps: connectors and DiT, from encoder states to the loss.

Letters: B batch, L tokens, T tokens of one source, C latent channels, h, w latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uniworld.kernels.flow_noise import flow_noise
from uniworld.kernels.region_mse import region_mse
from uniworld.models.conditioning import Conditioning, TextLayout, assemble, layout_text
from uniworld.models.connectors import Connector
from uniworld.models.flow import LATENT_SCALE, image_ids, pack, unpack
from uniworld.models.flux import FluxTransformer
from uniworld.models.queries import LearnedQueries
from uniworld.models.vlm import VLMStates


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A batch after the frozen encoders: what live encoding makes and what `precompute` stores.

    vlm_states: [B, L, D_vlm]; attention_mask: [B, L] on the CPU; image_ends: for each sample, the column of each
    image's `<|vision_end|>`. siglip_states: [num_images, T, D_siglip] (or what `model.references` puts in their place)
    or None; t5_states: [B, T, D_joint] or None; pooled: [B, P]. latent_mean, latent_std: [B, C, h, w], moments of the
    scaled latents. region_weight: [B, 1, h, w] fp32 or None for ones. valid: [B, 1, h, w] bool or None where no
    latent is padding.
    prompt: with learned queries, the VLM's pass that they go on from; attention_mask and image_ends are then theirs.
    """

    vlm_states: Tensor
    attention_mask: Tensor
    image_ends: tuple[tuple[int, ...], ...]
    siglip_states: Tensor | None
    t5_states: Tensor | None
    pooled: Tensor
    latent_mean: Tensor
    latent_std: Tensor
    region_weight: Tensor | None = None
    valid: Tensor | None = None
    sample_ids: tuple[str, ...] = ()
    prompt: VLMStates | None = None

    def __len__(self) -> int:
        return self.vlm_states.shape[0]

    @property
    def num_image_tokens(self) -> int:
        """Packed tokens of one target."""
        return self.latent_mean.shape[2] * self.latent_mean.shape[3] // 4

    def to(self, device: torch.device, dtype: torch.dtype) -> "EncodedBatch":
        """States in the compute dtype, latents and weights in fp32, all on `device` but the mask."""

        def moved(x: Tensor | None, to_dtype: torch.dtype | None) -> Tensor | None:
            return None if x is None else x.to(device, to_dtype, non_blocking=True)

        states = {k: moved(getattr(self, k), dtype) for k in ("vlm_states", "siglip_states", "t5_states", "pooled")}
        fp32 = {k: moved(getattr(self, k), torch.float32) for k in ("latent_mean", "latent_std", "region_weight")}
        return replace(self, **states, **fp32, valid=moved(self.valid, None))


class TrainModel(nn.Module):
    """Connectors and DiT. `forward` is one training loss; names of parameters are what `stages` matches.

    Args:
        vae_projector: given where latents stand for reference pictures; it then takes the other one's place.
        queries: given where their states replace the prompt's; states_after is the VLM's method of that name.
    """

    def __init__(
        self,
        denoiser: FluxTransformer,
        denoise_projector: Connector,
        siglip_projector: Connector,
        *,
        vae_projector: Connector | None = None,
        queries: LearnedQueries | None = None,
        states_after: Callable[[VLMStates, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.denoise_projector = denoise_projector
        self.siglip_projector = siglip_projector
        self.vae_projector = vae_projector
        self.queries, self.states_after = queries, states_after

    def forward(
        self,
        batch: EncodedBatch,
        latents: Tensor,
        noise: Tensor,
        sigma: Tensor,
        guidance_scale: float = 1.0,
        level_weight: Tensor | None = None,
        rollout: bool = False,
    ) -> Tensor:
        """The weighted flow-matching loss.

        Args:
            batch: on the model's device.
            latents, noise: [B, C, h, w] fp32; sigma: [B] fp32.
            level_weight: [B], weight of each sample's noise level, or None.
            rollout: whether the noisy picture is the model's own, as in sampling, see `predict_from_own`.

        Returns: scalar fp32, the mean over valid latents of weight * (prediction - (noise - latents))^2.
        """
        predict = self.predict_from_own if rollout else self.predict
        pred, target = predict(batch, latents, noise, sigma, guidance_scale)
        weight = combined_weight(batch.region_weight, level_weight, latents)
        valid = None if batch.valid is None else pack(batch.valid)
        return region_mse(pred, target, weight, valid)

    @property
    def reference_projector(self) -> Connector:
        """The connector of what stands for reference pictures."""
        return self.siglip_projector if self.vae_projector is None else self.vae_projector

    def predict(
        self, batch: EncodedBatch, latents: Tensor, noise: Tensor, sigma: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """The DiT's velocity and its target, both packed [B, h w / 4, 4 C]."""
        dtype = batch.vlm_states.dtype
        noisy, target = flow_noise(latents, noise, sigma, dtype=dtype)
        conditioning = self.condition(batch)
        guidance = torch.full_like(sigma, guidance_scale) if self.denoiser.config.guidance_embeds else None
        height, width = latents.shape[2] * LATENT_SCALE, latents.shape[3] * LATENT_SCALE
        pred = self.denoiser(
            noisy,
            conditioning.txt,
            conditioning.pooled,
            sigma,
            guidance,
            image_ids(height, width, latents.device),
            conditioning.lengths_if_padded,
        )
        return pred, target

    def predict_from_own(
        self, batch: EncodedBatch, latents: Tensor, noise: Tensor, sigma: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `predict`, of a sampling run that has come to sigma in one step from pure noise, and has one to go.

        Where a model comes from its own first step, mistakes and all, and not from the right picture, is what it never
        sees in flow matching. The step is not learned through. Prediction and target are scaled by sigma, so that
        errors of the picture count as at a sigma of 1.

        Source: Deng et al., 2023, "Markup-to-Image Diffusion Models with Scheduled Sampling", section 3.2.
        """
        with torch.no_grad():
            velocity, _ = self.predict(batch, latents, noise, torch.ones_like(sigma), guidance_scale)
            height, width = latents.shape[2] * LATENT_SCALE, latents.shape[3] * LATENT_SCALE
            drawn = noise - unpack(velocity.float(), height, width)
        pred, target = self.predict(batch, drawn, noise, sigma, guidance_scale)
        scale = sigma.view(-1, 1, 1)
        return pred * scale.to(pred.dtype), target * scale + pack(drawn - latents)

    def condition(self, batch: EncodedBatch) -> Conditioning:
        siglip, t5 = batch.siglip_states, batch.t5_states
        layout = layout_text(
            batch.attention_mask,
            batch.image_ends if siglip is not None else [()] * len(batch),
            num_siglip_tokens=0 if siglip is None else siglip.shape[1],
            num_t5_tokens=0 if t5 is None else t5.shape[1],
        )
        if siglip is None and self._references_learn:
            siglip, layout = self._no_reference(batch.vlm_states, layout)
        return assemble(
            layout,
            vlm_states=batch.vlm_states if self.queries is None else self.queries(self.states_after, batch.prompt),
            denoise_projector=self.denoise_projector,
            siglip_states=siglip,
            siglip_projector=self.reference_projector,
            t5_states=t5,
            pooled=batch.pooled,
        )

    @property
    def _references_learn(self) -> bool:
        learns = any(parameter.requires_grad for parameter in self.reference_projector.parameters())
        return learns and torch.is_grad_enabled()

    def _no_reference(self, like: Tensor, layout: TextLayout) -> tuple[Tensor, TextLayout]:
        """A state that goes nowhere, for a batch without pictures: its connector then has gradients, of zero, as that
        of a rank whose batch has some. Ranks that reduce different tensors hang, or die."""
        states = like.new_zeros(1, 1, self.reference_projector[0].in_features)
        return states, replace(layout, siglip_rows=torch.tensor([-1]))


def combined_weight(region_weight: Tensor | None, level_weight: Tensor | None, latents: Tensor) -> Tensor | None:
    """Weights of the packed latents, [B, h w / 4, 4] fp32, or None where all are 1."""
    if region_weight is None and level_weight is None:
        return None
    B, _, h, w = latents.shape
    weight = latents.new_ones(B, 1, h, w) if region_weight is None else region_weight.expand(B, 1, h, w)
    if level_weight is not None:
        weight = weight * level_weight.view(B, 1, 1, 1)
    return pack(weight.contiguous())
