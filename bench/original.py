"""One request on the parts of diffusers and transformers, as the authors' inference does it: the peer of `Engine`.

Plain connectors and concatenation, diffusers' transformer with text projection and modulation in every step, its
scheduler, its VAE. As the authors run it, the VLM runs twice: for the routing, with logits of every token, and for the
embeddings; and SigLIP runs even where there is no reference, on a blank picture whose states nobody reads. Pictures and
words are prepared by the same code as ours, and all weights are shared, so what differs is how the model is run.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from uniworld.models import flow
from uniworld.models.prompts import VLMInputs, chat_text
from uniworld.models.unified import UniWorld
from uniworld.models.vlm import rope_index


class OriginalPipeline:
    """Runs requests on the modules of `model`, except the DiT, which is diffusers' `transformer`.

    Args:
        as_authors: False leaves out what a plain pipeline would not do: the routing pass and the blank picture.
    """

    def __init__(self, model: UniWorld, transformer, *, as_authors: bool = True):
        self.model, self.transformer, self.as_authors = model, transformer, as_authors
        shift = model.time_shift
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=shift.base_shift,
            max_shift=shift.max_shift,
            base_image_seq_len=shift.base_image_seq_len,
            max_image_seq_len=shift.max_image_seq_len,
        )

    @torch.no_grad()
    def draw(
        self,
        images: list[Image.Image],
        prompt: str,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        seed: int,
        guidance_scale: float = 3.5,
    ) -> tuple[Tensor, Image.Image]:
        """Packed latents [1, L, C] fp32 and the picture. CLIP gets the prompt where T5 does, else "", as ours."""
        device, dtype = self.model.device, self.model.dtype
        inputs = self.model.processor.encode([chat_text(prompt, len(images))], [images])
        if self.as_authors:
            self._route(inputs)
        txt = self._text_sequence(inputs, images, prompt)
        texts = self.model.text_encoders
        pooled = texts.pooled([prompt if texts.has_t5 else ""]).to(dtype)

        latents = flow.initial_noise(seed, height, width, self.transformer.config.in_channels // 4).to(device)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        config = self.scheduler.config
        mu = flow.shift_mu(
            latents.shape[1],
            base_shift=config.base_shift,
            max_shift=config.max_shift,
            base_image_seq_len=config.base_image_seq_len,
            max_image_seq_len=config.max_image_seq_len,
        )
        self.scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
        guidance = torch.full((1,), guidance_scale, device=device, dtype=torch.float32)
        img_ids, txt_ids = flow.image_ids(height, width, device), torch.zeros(txt.shape[1], 3, device=device)
        for t in self.scheduler.timesteps:
            velocity = self.transformer(
                hidden_states=latents.to(dtype),
                encoder_hidden_states=txt,
                pooled_projections=pooled,
                timestep=t.expand(1).to(latents.dtype) / 1000,
                guidance=guidance,
                img_ids=img_ids,
                txt_ids=txt_ids,
                return_dict=False,
            )[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents, self._decode(latents, height, width)

    def _route(self, inputs: VLMInputs) -> Tensor:
        """The first VLM pass, whose only use is the task head; the logits of a text answer come with it."""
        states = vlm_states(self.model, inputs)
        self.model.vlm.model.lm_head(states)
        state = states[0, inputs.assistant_positions[0]]
        head = self.model.task_head
        return state if head is None else head.draw_probability(state)

    def _text_sequence(self, inputs: VLMInputs, images: list[Image.Image], prompt: str) -> Tensor:
        """The second VLM pass, projected, with each image's semantic tokens before its end, and T5's behind."""
        model = self.model
        txt = plain(model.denoise_projector, vlm_states(model, inputs))[0]
        semantic, encoder = (), model.semantic_encoder
        if images:
            semantic = plain(model.siglip_projector, encoder(encoder.preprocess(images)).to(model.dtype))
        elif self.as_authors:
            encoder(encoder.preprocess([Image.new("RGB", (encoder.size_px, encoder.size_px))]))
        parts = [insert_semantic(txt, semantic, inputs.image_end_positions[0])]
        if model.text_encoders.has_t5:
            parts.append(model.text_encoders.t5_states([prompt])[0].to(model.dtype))
        return torch.cat(parts)[None]

    def _decode(self, latents: Tensor, height: int, width: int) -> Image.Image:
        vae = self.model.vae.model
        unpacked = flow.unpack(latents, height, width) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(unpacked.to(vae.dtype), return_dict=False)[0]
        levels = (pixels[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        return Image.fromarray((levels * 255).round().astype("uint8"))


def vlm_states(model: UniWorld, inputs: VLMInputs) -> Tensor:
    """The VLM's last hidden state, [B, L, D], called as transformers' documentation has it."""
    vlm, device = model.vlm.model, model.device
    images = {}
    if inputs.pixel_values is not None:
        images["pixel_values"] = inputs.pixel_values.to(device, model.dtype)
        images["image_grid_thw"] = inputs.image_grid_thw.to(device)
    merge = model.vlm.merge_size
    positions, _ = rope_index(inputs.mm_token_type_ids, inputs.attention_mask, inputs.image_grid_thw, merge)
    output = vlm.model(
        input_ids=inputs.input_ids.to(device),
        attention_mask=inputs.attention_mask.to(device),
        mm_token_type_ids=inputs.mm_token_type_ids.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        **images,
    )
    return output.last_hidden_state


def insert_semantic(txt: Tensor, semantic: Sequence[Tensor], image_ends: Sequence[int]) -> Tensor:
    """The text sequence [L, D] with each image's semantic tokens [T, D] before the image's end."""
    parts, start = [], 0
    for tokens, end in zip(semantic, image_ends):
        parts += [txt[start:end], tokens]
        start = end
    return torch.cat([*parts, txt[start:]])


def plain(connector: Iterable[nn.Module], states: Tensor) -> Tensor:
    """The connector's own layers one after the other, without the fused op."""
    for layer in connector:
        states = layer(states)
    return states
