"""Whole edits with weights that wait in host memory: what copies behind kernels cost, and the memory that is left over.

One set of random weights at full size, placed anew for every level. `bench/gpu.sh` has it as its last section, since
every level copies tens of gigabytes to pinned memory. `UNIWORLD_BENCH_SIZE=tiny` is a dry run.
"""

import os
import statistics

import pytest
import torch
from full_cases import FULL, TOY, noise_pictures
from full_model import random_uniworld
from full_requests import draw_ours
from peers import MISSING
from residents import free
from timing import Samples, interleave

pytest.importorskip("diffusers", reason=f"{MISSING}; the VAE needs it")

from uniworld.engine import Engine
from uniworld.engine.offload import GROUPS, LEVELS, weight_bytes
from uniworld.engine.quantize import quantized_copy

CUDA = torch.cuda.is_available()
SCALE = TOY if os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny" else FULL
DEVICE, DTYPE = ("cuda" if CUDA else "cpu"), (torch.bfloat16 if CUDA else torch.float32)
CASE = SCALE.request_cases[0]
NUM_STEPS = SCALE.overhead_steps
TIERS = [(quantize, level) for level in (None, *LEVELS) for quantize in (None, "fp8", "nf4")]

pytestmark = pytest.mark.skipif(
    SCALE is FULL and not CUDA, reason="full size needs a CUDA device (UNIWORLD_BENCH_SIZE=tiny)"
)


@pytest.mark.parametrize("quantize, level", TIERS, ids=str)
def test_offloaded(quantize, level, report):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    engine, stated = engine_of(quantize, level)
    samples, steps_s, peak = measure(engine)
    more = {"step_s": steps_s, "steps": NUM_STEPS, "stated_gib": stated / 2**30}
    more |= {} if peak is None else {"peak_gib": peak / 2**30}
    side = f"{quantize or 'unquantized'}, offload={level or 'none'}"
    report(SCALE.bench, f"offloaded, {CASE}", side, DTYPE, samples, **more)
    del engine
    free()


def engine_of(quantize: str | None, level: str | None) -> tuple[Engine, int]:
    """An engine at this level, and the bytes of weights that `docs/memory.md` says are on the device at most."""
    model = random_uniworld(SCALE.size, DEVICE, DTYPE)
    if quantize:
        model.denoiser = quantized_copy(model.denoiser, quantize)
        free()
    sizes = weight_bytes(model, level)
    return Engine(model, offload=level), max(sizes[group] for group in GROUPS)


def measure(engine: Engine) -> tuple[Samples, float, int | None]:
    """Seconds of requests, the median seconds of their steps, and the most bytes that were allocated."""
    size = {"height": CASE.size_px, "width": CASE.size_px}
    settings = {**size, "num_inference_steps": NUM_STEPS, "seed": 7}
    denoising = []

    def draw() -> None:
        _, told = draw_ours(engine, noise_pictures(CASE.num_references), settings)
        denoising.append(told["rooms_s"]["denoise"] / NUM_STEPS)

    draw()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    del denoising[:]
    samples = interleave({"": [draw]}, sample_s=0.0, device=DEVICE, warmup=0)[""]
    return samples, statistics.median(denoising), torch.cuda.max_memory_allocated() if CUDA else None
