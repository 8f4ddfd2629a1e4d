"""A request's time outside of its models, on the CPU: words, pictures, noise, and the host's work between the models.

Pictures have their full sizes on the way in and out. The models, which do not count, are those of `tiny`; for the DiT
and the VAE's decoder, which would take seconds, there are stand-ins. On a GPU `full_scale.py` measures the same at full
size.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from full_cases import Case, Scale
from full_requests import OURS, OUTSIDE, RequestBench
from full_steps import has_diffusers
from peers import MISSING
from torch import Tensor

from uniworld.models.flow import LATENT_SCALE

BENCH = "overhead"
NUM_STEPS = 28
SCALE = Scale(
    BENCH,
    {"siglip": {"image_size": 512}},
    sides_px=(1024, 512),
    batches=(),
    num_steps=NUM_STEPS,
    overhead_steps=NUM_STEPS,
)


@functools.cache
def request_bench() -> RequestBench:
    return RequestBench(SCALE, "cpu", torch.float32)


@contextmanager
def stand_ins(bench: RequestBench) -> Iterator[None]:
    """The DiT returns what it is given, and the decoder a grey picture."""

    def decode(latents: Tensor) -> Tensor:
        return latents.new_zeros(len(latents), 3, *(LATENT_SCALE * side for side in latents.shape[2:]))

    dit = bench.ours.denoiser.model
    with (
        mock.patch.object(dit, "denoise", lambda img, *others: img),
        mock.patch.object(bench.model.vae, "decode", decode),
    ):
        yield


@pytest.mark.skipif(not has_diffusers(), reason=f"{MISSING}; requests need its VAE")
@pytest.mark.parametrize("case", SCALE.request_cases, ids=str)
def test_overhead(case: Case, report):
    with stand_ins(request_bench()):
        samples, seconds = request_bench().overhead(case)
    outside_s = {part: seconds[part] for part in OUTSIDE if part in seconds}
    report(BENCH, str(case), OURS, torch.float32, samples, kind="cpu", outside_s=outside_s)
