"""The parts of UniWorld-V1 as one object: what `uniworld.checkpoint.load` makes and the engine and trainer use."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniworld.models.connectors import Connector
from uniworld.models.flux import FluxTransformer
from uniworld.models.known_world import KnownWorld
from uniworld.models.prompts import PromptProcessor
from uniworld.models.queries import LearnedQueries
from uniworld.models.references import LatentEncoder
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.task_head import TaskHead
from uniworld.models.text_encoders import TextEncoders
from uniworld.models.vae import ImageAutoencoder
from uniworld.models.vlm import VisionLanguageModel

MAX_STEPS, MAX_GUIDANCE = 1000, 100  # of a request
FULL_ANCHOR_PX = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TimeShift:
    """How sampling sigmas shift with the number of image tokens (FLUX's scheduler config); see `flow.shift_mu`."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096


@dataclass(kw_only=True)
class UniWorld:
    """All parts on one device, frozen and in eval mode as loaded."""

    name: str
    """As asked for: "tiny", a Hub id or a path."""
    folder: Path
    """The local folder of the checkpoint: where tokenizer and processor files are copied from on saving."""
    config: dict[str, Any]
    """The checkpoint's config.json, token ids completed from the tokenizer."""
    vlm: VisionLanguageModel
    processor: PromptProcessor
    denoiser: FluxTransformer
    denoise_projector: Connector
    siglip_projector: Connector
    vae_projector: Connector | None = None
    """Used where `references` is "vae"."""
    queries: LearnedQueries | None = None
    """Where there are some, their states condition the DiT in place of the prompt's."""
    semantic_encoder: SemanticEncoder
    text_encoders: TextEncoders
    vae: ImageAutoencoder
    task_head: TaskHead | None = None
    """Routes between picture and text; None where the checkpoint has none."""
    time_shift: TimeShift = field(default_factory=TimeShift)
    anchor_px: int = FULL_ANCHOR_PX
    """Area in pixels of the pictures the model was made for; sizes "auto" aim at it."""
    num_inference_steps: int = 28
    edit_inference_steps: int | None = None
    guidance_scale: float = 3.5
    """Steps and embedded guidance of a request that names none; of one with pictures the second number, where there is
    one: what they show need not be found in steps."""
    images_last: bool = False
    """Whether the pictures of a conversation stand behind its last message, whatever turn showed them, and see that
    turn alone, of which alone is drawn: a small model answers what it has read with the question in mind, mixes up
    several questions, and has learned to draw from single messages."""
    references: str = "siglip"
    """What stands for a reference picture beside its VLM states: one of `references.REFERENCES`."""
    random_weights: bool = False
    """Whether nothing was trained, so that pictures are noise."""
    known_world: KnownWorld | None = None
    """Of a small model: what pictures it was trained on."""
    device: torch.device
    dtype: torch.dtype

    @property
    def reference_encoder(self) -> SemanticEncoder | LatentEncoder | None:
        """What makes states of reference pictures; None where nothing stands for them."""
        if self.references == "vae":
            return LatentEncoder(self.vae, self.semantic_encoder.size_px)
        return self.semantic_encoder if self.references == "siglip" else None

    @property
    def reference_projector(self) -> Connector:
        """The connector of those states. Raises: ValueError where the checkpoint has none for latents."""
        if self.references != "vae":
            return self.siglip_projector
        if self.vae_projector is None:
            raise ValueError(f"references=vae: {self.name} has no vae_projector")
        return self.vae_projector

    def checkpoint_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that a UniWorld checkpoint holds, under their names in `checkpoint.names`."""
        yield "vlm", self.vlm.model
        yield "denoiser", self.denoiser
        for name in ("denoise_projector", "siglip_projector", "vae_projector", "queries"):
            module = getattr(self, name)
            if module is not None:
                yield name, module
