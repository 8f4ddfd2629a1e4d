"""The image autoencoder of `tiny`, trained to give pictures back.

The loss is the absolute plus the squared error, the latter since pictures are judged by PSNR, and a KL term so small
that it only keeps latents near zero. Source: Rombach et al., 2022, section 3.1, without the adversarial term, which
buys texture that this world does not have. Things, which have most of the detail and take a tenth of the pixels, count
more: with equal weights they came back at 22 dB where whole pictures had 31.

Letters: B pictures, H, W pixels.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from uniworld.checkpoint.build import encoder_plan
from uniworld.checkpoint.locate import read_json
from uniworld.checkpoint.save import save_module
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.weights import fill
from uniworld.data.scenes import solids
from uniworld.data.scenes.render import geometry
from uniworld.data.scenes.tasks import MIXTURE, Item, make_item
from uniworld.models.vae import ImageAutoencoder
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.sizes import VAE

TASKS, THINGS = tuple(MIXTURE), "things"
KL_WEIGHT = 1e-6
THING_WEIGHT = 6.0  # of a pixel where a thing is
SCORED_AT_ONCE = 32
DIFFUSERS_STEM = "diffusion_pytorch_model"  # of the names of weight files


class Autoencoder:
    """The part `vae`: diffusers' AutoencoderKL in the sizes of `sizes.VAE`."""

    not_for_making = ("module",)

    def __init__(self, config: PartConfig):
        from diffusers import AutoencoderKL

        torch.manual_seed(config.seed)
        self.config = config
        self.module: nn.Module = AutoencoderKL.from_config(VAE)
        if config.start is not None:
            self.module.load_state_dict(load_vae(Path(config.start)).model.state_dict())
        if config.decoder_only:
            self.module.encoder.requires_grad_(False)

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def make(self, seeds: range) -> dict[str, Tensor]:
        """pictures uint8 [B, H, W, 3]: the target of each item, whose task goes round, so that maps and styles are seen
        too; there bool [B, H, W]: where a thing is."""
        return _stacked(seeds, "train", self.config.size_px)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        pixels, there = as_pixels(batch["pictures"].to(self._device)), batch["there"].to(self._device)[:, None]
        posterior = self.module.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        decoded = self.module.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - pixels
        kl = posterior.kl().mean() / pixels[0].numel()
        squared = error.square()
        weight = torch.where(there, THING_WEIGHT, 1.0)
        weighted = (weight * (error.abs() + squared)).sum() / (weight.sum() * error.shape[1])
        more = {"psnr_db": psnr(squared.detach().mean()), "kl": kl.detach()}
        return weighted + KL_WEIGHT * kl, more

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """PSNR in dB over held-out pictures: of all, by task, and where things are; the mean of the pictures' own."""
        found: dict[str, list[float]] = defaultdict(list)
        seeds = range(self.config.num_checked)
        for start in range(0, len(seeds), SCORED_AT_ONCE):
            some = seeds[start : start + SCORED_AT_ONCE]
            batch = _stacked(some, "held-out", self.config.size_px)
            pixels = as_pixels(batch["pictures"].to(self._device))
            decoded = self.module.decode(self.module.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
            for seed, squared, there in zip(some, (decoded - pixels).square().mean(1).cpu(), batch["there"]):
                found[TASKS[seed % len(TASKS)]].append(float(psnr(squared.mean())))
                if there.any():
                    found[THINGS].append(float(psnr(squared[there].mean())))
        scores = {f"psnr_{name}_db": float(np.mean(values)) for name, values in sorted(found.items())}
        every = [value for name, values in found.items() if name != THINGS for value in values]
        return {"psnr_db": float(np.mean(every)), **scores}

    def export(self, folder: Path) -> None:
        """The folder `flux/vae`; scale and shift bring the latents of this world to mean 0 and deviation 1."""
        scaling = read_json(Path(self.config.start) / "config.json") if self.config.decoder_only else self._scaling()
        settings = VAE | {name: scaling[name] for name in ("scaling_factor", "shift_factor")}
        save_module(folder, self.module.named_parameters(), settings, DIFFUSERS_STEM, STORED_DTYPE)

    @torch.no_grad()
    def _scaling(self) -> dict[str, float]:
        latents = []
        for start in range(0, self.config.num_checked, SCORED_AT_ONCE):
            batch = self.make(range(start, start + SCORED_AT_ONCE))["pictures"].to(self._device)
            latents.append(self.module.encode(as_pixels(batch)).latent_dist.mean)
        values = torch.cat(latents)
        return {"scaling_factor": 1 / float(values.std()), "shift_factor": float(values.mean())}


def load_vae(folder: Path) -> ImageAutoencoder:
    """A trained image autoencoder, fp32 and frozen. Raises: FileNotFoundError where there is none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no image autoencoder; train one first (configs/tiny/vae.yaml)")
    vae = ImageAutoencoder.from_config(read_json(folder / "config.json"))
    plan = encoder_plan(folder, vae.model, torch.device("cpu"), torch.float32, stem=DIFFUSERS_STEM)
    plan.check()
    fill([plan])
    return vae.requires_grad_(False)


def item(seed: int, split: str, size_px: int) -> Item:
    """An item, whose task goes round."""
    return make_item(TASKS[seed % len(TASKS)], seed, split, size_px=size_px)


def picture(seed: int, split: str, size_px: int) -> np.ndarray:
    """uint8 [H, W, 3]: the target picture of an item, or the picture that is talked about."""
    return item(seed, split, size_px).pictures[-1]


def _stacked(seeds: Sequence[int], split: str, size_px: int) -> dict[str, Tensor]:
    """As of `Autoencoder.make`."""
    items = [item(seed, split, size_px) for seed in seeds]
    there = [geometry(solids.tables(one.scenes[-1]), size_px)[0] > 0 for one in items]
    return {
        "pictures": torch.from_numpy(np.stack([one.pictures[-1] for one in items])),
        "there": torch.from_numpy(np.stack(there)),
    }


def as_pixels(levels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1].

    Contiguous: on one CPU core the autoencoder trains at 11.6 pictures/s so, at 9.5 with channels last.
    """
    return levels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def psnr(squared: Tensor) -> Tensor:
    """dB of a mean squared error of values in [-1, 1]."""
    return -10 * torch.log10(squared / 4 + 1e-12)
