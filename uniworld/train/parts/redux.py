"""What FLUX.1 Redux brings to UniWorld, for `tiny`: a connector by which the DiT draws the picture that it is shown.

The authors start `siglip_projector` from weights of Redux, and not fresh. Here the base DiT learns along with it. Most
of a batch is drawn from the semantic states of the very picture that is wanted, and from nothing else: so the DiT finds
out where a patch stands, which it is not told, within some hundred steps. Stage 2 from a fresh connector does not: its
loss has not moved after 460. The rest is drawn from words, lest they be forgotten.

Letters: B pictures, T tokens of a picture's semantic states, D their width.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.connector_files import write_connector
from uniworld.checkpoint.load import load_denoiser
from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.names import diffusers_names
from uniworld.checkpoint.weights import Plan, fill, module_targets, read_headers
from uniworld.config import FlowConfig
from uniworld.data.scenes.tasks import Item
from uniworld.models.connectors import Connector
from uniworld.models.siglip import SemanticEncoder
from uniworld.train.noise import draw_sigma
from uniworld.train.parts.base import NO_POOLED_RATE, TextToImage, thing_weights
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.sizes import HIDDEN, SIGLIP, SIGLIP_PREPROCESSOR
from uniworld.train.parts.trained import fill_encoder, trained
from uniworld.train.parts.vae import DIFFUSERS_STEM

FLOW = FlowConfig(logit_mean=3.5, logit_std=2.0)  # as in stage 2: near pure noise the condition decides
NUM_TOKENS = (SIGLIP["image_size"] // SIGLIP["patch_size"]) ** 2
CONNECTOR = "siglip_projector"
SCORED_AT_ONCE, SCORED_SIGMA = 32, 0.9


class ReduxModel(nn.Module):
    """What learns is the DiT and the connector; the text encoders stay."""

    def __init__(self, denoiser: nn.Module, connector: Connector, t5: nn.Module, clip: nn.Module):
        super().__init__()
        self.denoiser, self.t5, self.clip = denoiser.requires_grad_(True), t5, clip
        self.siglip_projector = connector.requires_grad_(True)


class PictureToImage(TextToImage):
    """The part `redux`, which goes on from the base and draws from pictures too."""

    not_for_making = ("module", "text")

    def __init__(self, config: PartConfig):
        super().__init__(config)
        flux = trained(config, "base") if config.start is None else Path(config.start) / "flux"
        self.siglip_folder = trained(config, "semantic_encoder")
        if config.start is None:
            denoiser = self.module.denoiser
            _fill_denoiser(flux / "transformer", denoiser)
            connector = Connector(SIGLIP["hidden_size"], 3 * HIDDEN, HIDDEN)
        else:
            model = load_denoiser(config.start, device="cpu", dtype=torch.float32, progress=False)
            denoiser, connector = model.denoiser, model.siglip_projector
        clip, t5 = self.module.clip, self.module.t5
        fill_encoder(flux / "text_encoder", clip)
        fill_encoder(flux / "text_encoder_2", t5)
        self.module = ReduxModel(denoiser, connector, t5, clip)
        self.encoder = SemanticEncoder.from_config(read_config(self.siglip_folder), SIGLIP_PREPROCESSOR)
        fill_encoder(self.siglip_folder, self.encoder.model)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents = self._latents(batch, generator)
        ones = torch.ones(len(latents), device=self._device)
        num_words = int(self.config.words_share * len(latents))
        sigma = draw_sigma(FLOW, len(latents), NUM_TOKENS, generator).to(self._device)
        noise = torch.randn(latents.shape, generator=generator).to(self._device)
        given = {}
        if num_words:
            without = (torch.rand(num_words, generator=generator) < NO_POOLED_RATE).to(self._device)
            words = {name: batch[name][:num_words] for name in ("t5_ids", "clip_ids")}
            said = self._condition(words, without, torch.zeros_like(without))
            given["words"] = slice(num_words), said
        given["pictures"] = slice(num_words, None), self._seen(batch["states"][num_words:])
        errors = {}
        for name, (part, (states, pooled)) in given.items():
            pred, target = self._predict(states, pooled, latents[part], noise[part], sigma[part], ones[part])
            errors[name] = (pred.float() - target).square().mean(-1)
        weights = thing_weights(batch["points"]).to(self._device)
        loss = (weights * torch.cat(list(errors.values()))).sum() / weights.sum()
        return loss, {name: error.detach().mean() for name, error in errors.items()}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The loss on held-out pictures at high noise, drawn from words and from the pictures themselves."""
        found: dict[str, list[float]] = {"words": [], "pictures": []}
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            made = self._make_items(range(start, start + SCORED_AT_ONCE), "held-out")
            batch = self._as_batch(*map(torch.from_numpy, made))
            generator = torch.Generator().manual_seed(start)
            latents = self._latents(batch, generator)
            noise = torch.randn(latents.shape, generator=generator).to(self._device)
            ones = torch.ones(len(latents), device=self._device)
            none = torch.zeros_like(ones, dtype=torch.bool)
            conditions = {"words": self._condition(batch, none, none), "pictures": self._seen(batch["states"])}
            for name, given in conditions.items():
                pred, target = self._predict(*given, latents, noise, SCORED_SIGMA * ones, ones)
                found[name].append(float((pred.float() - target).square().mean()))
        self._save_samples(Path(self.config.run_dir) / "samples.png")
        return {f"loss_of_{name}_at_{SCORED_SIGMA}": float(np.mean(values)) for name, values in found.items()}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """The base's folder with the new DiT, and the connector as the authors' `siglip_projector.bin`."""
        super().export(folder)
        tensors = dict(self.module.siglip_projector.named_parameters())
        write_connector(folder, CONNECTOR, {name: tensor.detach().float().cpu() for name, tensor in tensors.items()})

    @property
    def _made_with(self) -> tuple[Path, ...]:
        return *super()._made_with, self.siglip_folder / "model.safetensors"

    @property
    def _shape(self) -> tuple[int, ...]:
        """Moments and semantic states of an item, in one row."""
        return (math.prod(super()._shape) + NUM_TOKENS * SIGLIP["hidden_size"],)

    @torch.no_grad()
    def _encode(self, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
        moments, numbers = super()._encode(items)
        states = self.encoder(self.encoder.preprocess([Image.fromarray(item.pictures[-1]) for item in items]))
        rows = moments.reshape(len(moments), -1), states.half().flatten(1).numpy()
        return np.concatenate(rows, axis=1), numbers

    def _as_batch(self, moments: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """As of the base, with states [B, T, D]."""
        shape = super()._shape
        moments, states = moments.split([math.prod(shape), moments.shape[1] - math.prod(shape)], dim=1)
        batch = super()._as_batch(moments.unflatten(1, shape), numbers)
        return batch | {"states": states.float().unflatten(1, (NUM_TOKENS, -1))}

    def _seen(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """In the words' place semantic states [B, T, D] through the connector, and the pooled text of ""."""
        connector, B = self.module.siglip_projector, len(states)
        states = states.to(self._device, connector[0].weight.dtype)
        return connector(states.flatten(0, 1)).unflatten(0, (B, -1)), self.text.pooled([""]).expand(B, -1)


def _fill_denoiser(folder: Path, denoiser: nn.Module) -> None:
    """The weights of a diffusers folder, fp32."""
    headers = read_headers(weight_files(folder, DIFFUSERS_STEM))
    plan = Plan(folder, headers, module_targets(denoiser, diffusers_names), torch.device("cpu"), torch.float32)
    plan.check()
    fill([plan])
