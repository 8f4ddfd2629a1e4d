"""Live encoding: the frozen encoders turn a batch of samples into the states that training works on."""

import torch

from uniworld.data.batch import TrainBatch
from uniworld.models.unified import UniWorld
from uniworld.train.model import EncodedBatch


class Encoders:
    """VLM, semantic encoder, text encoders and VAE, none of which learns.

    Args:
        model: the loaded parts.
        use_siglip: insert states of reference pictures, semantic ones unless the model has others; use_t5: add T5
            states of the instruction.
    """

    def __init__(self, model: UniWorld, *, use_siglip: bool, use_t5: bool):
        if use_t5 and not model.text_encoders.has_t5:
            raise ValueError("model.use_t5=true: the FLUX folder has no T5")
        self.model, self.use_siglip, self.use_t5 = model, use_siglip, use_t5
        self._pooled: torch.Tensor | None = None  # [1, P], the same for every batch

    @torch.no_grad()
    def encode(self, batch: TrainBatch) -> EncodedBatch:
        """States of a batch on the model's device; pooled is CLIP of "", as in the authors' training."""
        model, B = self.model, len(batch)
        siglip_states = None
        if self.use_siglip and batch.siglip_pixels is not None:
            siglip_states = model.reference_encoder(batch.siglip_pixels)
        prompt, mask, image_ends = None, batch.inputs.attention_mask, batch.inputs.image_end_positions
        states = model.vlm.encode(batch.inputs, use_cache=model.queries is not None)
        if model.queries is not None:
            prompt, (mask, image_ends) = states, model.queries.layout(image_ends)
        if self._pooled is None:
            self._pooled = model.text_encoders.pooled([""])
        mean, std = model.vae.encode_moments(batch.target)
        return EncodedBatch(
            vlm_states=states.hidden_states,
            attention_mask=mask,
            image_ends=image_ends,
            siglip_states=siglip_states,
            t5_states=model.text_encoders.t5_states(batch.instructions) if self.use_t5 else None,
            pooled=self._pooled.expand(B, -1),
            latent_mean=(mean.float() - model.vae.shift) * model.vae.scale,
            latent_std=std.float() * model.vae.scale,
            region_weight=batch.region_weight,
            sample_ids=batch.sample_ids,
            prompt=prompt,
        ).to(model.device, model.dtype)


def draw_latents(batch: EncodedBatch, generator: torch.Generator) -> torch.Tensor:
    """A fresh sample of the VAE's posterior, [B, C, h, w] fp32; the noise is drawn on the CPU."""
    noise = torch.randn(batch.latent_mean.shape, generator=generator)
    return batch.latent_mean + batch.latent_std * noise.to(batch.latent_mean.device)
