"""The VAE's decoder with channels last in memory, as the engine has it on a GPU, and in torch's own layout.

FLUX.1's VAE with random weights.
"""

import functools
import os

import pytest
import torch
from full_model import TINY_SIZE, VAE, materialise
from peers import MISSING, fill_random, relative_error
from timing import Samples, interleave
from torch import Tensor

from uniworld.checkpoint import tiny_configs
from uniworld.checkpoint.weights import parameters_on_meta
from uniworld.models.flow import LATENT_SCALE
from uniworld.models.vae import ImageAutoencoder

pytest.importorskip("diffusers", reason=MISSING)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "decode_dry_run" if DRY_RUN else "decode"
CONFIG = tiny_configs.VAE | (TINY_SIZE if DRY_RUN else VAE)
SIZES_PX = (64,) if DRY_RUN else (1024, 512) if DEVICE == "cuda" else (256,)
LAST, PLAIN = "channels last", "torch's layout"


def decoder(channels_last: bool) -> ImageAutoencoder:
    with parameters_on_meta():
        vae = ImageAutoencoder.from_config(CONFIG)
    materialise(vae, DEVICE, DTYPE)
    fill_random(vae, seed=0)
    if channels_last:
        vae.use_channels_last()
    return vae


@functools.cache
def measure(size_px: int) -> tuple[dict[str, Samples], float]:
    """Samples of both layouts, and the distance of their pictures."""
    side = size_px // LATENT_SCALE
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, CONFIG["latent_channels"], side, side, generator=generator).to(DEVICE)
    sides = {LAST: decoder(True), PLAIN: decoder(False)}
    drawn: dict[str, Tensor] = {name: vae.decode(latents) for name, vae in sides.items()}
    calls = {name: [functools.partial(vae.decode, latents)] for name, vae in sides.items()}
    samples = interleave(calls, sample_s=0.0, device=DEVICE, warmup=1)
    return samples, relative_error(drawn[LAST], drawn[PLAIN])


@pytest.mark.parametrize("side", (LAST, PLAIN))
@pytest.mark.parametrize("size_px", SIZES_PX)
def test_decode(size_px, side, report):
    samples, error = measure(size_px)
    more = {"times_longer": samples[side].median / samples[PLAIN].median}
    more |= {"error": error, "error_is": "relative to torch's layout"} if side == LAST else {}
    report(BENCH, f"decode, {size_px} px", side, DTYPE, samples[side], **more)
