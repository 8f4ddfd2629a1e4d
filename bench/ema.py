"""The EMA update at the sizes of a training run: one fused call against torch's multi-tensor one.

94 M parameters are stage 1's, 1 B a rank's share of stage 2's on four GPUs. The tensors are layers of 3072 x 3072
matrices and two vectors each. Bytes counted are the least that must move: average in and out, source in; the rate is
held against copying one tensor to another in the same run.
"""

import functools
import os

import ceilings
import pytest
import torch
from timing import Samples, interleave
from torch import Tensor

from uniworld.kernels.ema_update import ema_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "ema_dry_run" if DRY_RUN else "ema"
WIDTH = 64 if DRY_RUN else 3072
NUM_LAYERS = {"94 M": 10, "1 B": 106}  # of WIDTH^2 + 2 WIDTH parameters
DTYPES = (torch.bfloat16, torch.float32)
OURS, FOREACH, LOOP = "ours", "torch._foreach_lerp_", "one tensor after the other"
SIDES = {"94 M": (OURS, FOREACH, LOOP), "1 B": (OURS, FOREACH)}  # the loop takes the same time a parameter
DECAY = 0.999


COPY_BYTES = 2**20 if DRY_RUN else None


def test_ceiling(report):
    ceilings.report_one(report, BENCH, DEVICE, (), 0, copy_bytes=COPY_BYTES)


@pytest.mark.parametrize("size, side", [(size, side) for size, sides in SIDES.items() for side in sides])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_ema(dtype, size, side, report):
    samples = measure(size, dtype)
    num_elements = NUM_LAYERS[size] * WIDTH * (WIDTH + 2)
    num_bytes = num_elements * (8 + dtype.itemsize)
    more = {"parameters": num_elements, "gb_s": num_bytes / samples[side].median / 1e9}
    more |= ceilings.share(samples[side].median, num_bytes=num_bytes, device=DEVICE, copy_bytes=COPY_BYTES)
    more["times_faster"] = samples[FOREACH].median / samples[side].median
    report(BENCH, f"{size} parameters", side, dtype, samples[side], **more)


@functools.lru_cache(maxsize=1)
def measure(size: str, dtype: torch.dtype) -> dict[str, Samples]:
    """All sides on the same tensors, after their results were compared; nothing is kept but the samples."""
    ema, source = tensors(NUM_LAYERS[size], dtype)
    sides = {
        OURS: lambda: ema_update(ema, source, DECAY),
        FOREACH: lambda: foreach_lerp(ema, source),
        LOOP: lambda: loop(ema, source),
    }
    check(ema[0], source[0])
    calls = {side: [sides[side]] for side in SIDES[size]}
    sample_s = 0.02 if DEVICE == "cuda" else 0.0  # one call alone would be timed with its launch
    return interleave(calls, rounds=9, sample_s=sample_s, device=DEVICE, warmup=1)


def tensors(num_layers: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(WIDTH, WIDTH), (WIDTH,), (WIDTH,)] * num_layers
    ema = [torch.randn(s, generator=generator, device=DEVICE) for s in shapes]
    source = [torch.randn(s, generator=generator, device=DEVICE).to(dtype) for s in shapes]
    return ema, source


def foreach_lerp(ema: list[Tensor], source: list[Tensor]) -> None:
    """torch's multi-tensor update; it takes one dtype, so that a bf16 source is upcast first."""
    torch._foreach_lerp_(ema, [s.float() for s in source], 1 - DECAY)


def loop(ema: list[Tensor], source: list[Tensor]) -> None:
    """The authors' update of a trained parameter."""
    for e, s in zip(ema, source):
        e.sub_((1 - DECAY) * (e - s.to(e.dtype)))


def check(ema: Tensor, source: Tensor) -> None:
    expected = ema.double() + (1 - DECAY) * (source.double() - ema.double())
    for update in (lambda e, s: ema_update(e, s, DECAY), foreach_lerp, loop):
        found = ema.clone()
        update([found], [source])
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
