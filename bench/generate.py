"""A whole edit with the model `tiny` through the engine, against the same request on the parts of diffusers.

Same weights, prompt, picture and noise; nothing is cached between requests. `full_scale.py` does the same at the size
of UniWorld-V1 on a GPU.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from peers import MISSING, diffusers_flux, relative_error, same_attention
from PIL import Image
from timing import Samples, interleave

pytest.importorskip("diffusers", reason=MISSING)

from original import OriginalPipeline

from uniworld.engine import Engine
from uniworld.engine.cache import ConditioningCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPT = "Make it look like a watercolour painting"
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "generate_dry_run" if DRY_RUN else "generate"
NUM_STEPS = 3 if DRY_RUN else 28
SIZES_PX = (256, 512) if DEVICE == "cuda" else (256,)  # the size that `tiny` draws
SIDES = ("ours", "diffusers eager")
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the final latents: both sides must draw the same


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size_px", SIZES_PX)
def test_edit(size_px, side, report):
    samples, rooms, error = measure(size_px)
    more = {"steps": NUM_STEPS, "attention": engine().attention.name}
    more |= {"time_of_diffusers": samples[side].median / samples["diffusers eager"].median}
    if side == "ours":
        more |= {"rooms_s": rooms, "error": error, "error_is": "final latents, relative to diffusers eager"}
    report(BENCH, f"tiny, edit, {size_px} px, {NUM_STEPS} steps", side, DTYPE, samples[side], **more)


def example_picture() -> Image.Image:
    """The first photograph of `examples/`, or noise where there is none."""
    photos = sorted(path for path in EXAMPLES.glob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    if photos:
        return Image.open(photos[0]).convert("RGB")
    noise = torch.randint(0, 256, (512, 512, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


@functools.cache
def engine() -> Engine:
    return Engine.from_pretrained("tiny", device=DEVICE, dtype=DTYPE, progress=False)


@functools.cache
def measure(size_px: int) -> tuple[dict[str, Samples], dict[str, float], float]:
    """Samples of both sides, seconds by room of ours, and the distance of the final latents."""
    ours = engine()
    attention = ours.attention.name
    peer = OriginalPipeline(ours.model, diffusers_flux(ours.model.denoiser, DEVICE, attention))
    picture = example_picture()
    settings = {"height": size_px, "width": size_px, "num_inference_steps": NUM_STEPS, "seed": 7}
    settings["guidance_scale"] = ours.model.guidance_scale
    results = {}

    def edit_ours() -> None:
        ours.conditioner.cache = ConditioningCache()
        results["ours"] = ours.edit(picture, PROMPT, **settings)

    def edit_theirs() -> None:
        with same_attention(DEVICE, attention):
            results["theirs"] = peer.draw([picture], PROMPT, **settings)

    sides = {"ours": [edit_ours], "diffusers eager": [edit_theirs]}
    samples = interleave(sides, rounds=9, sample_s=0.0, device=DEVICE, warmup=1)
    error = relative_error(results["ours"].latents, results["theirs"][0])
    if error > MAX_ERROR[DTYPE]:
        raise ValueError(f"the sides drew different pictures: {error:.1e} between their latents")
    return samples, results["ours"].timings, error
