"""Stage 2 at full depth with its optimizer in host memory: whether one GPU of 80 GB holds it, and what a step takes.

All 12 B parameters of the DiT, of which 4.1 B learn, random weights, encoders live. There is no peer: no GPU holds what
the plain step keeps. The row says beside what was measured what `uniworld plan` says of the same config. `bench/gpu.sh`
has it among its last sections; `UNIWORLD_BENCH_SIZE=tiny` is a dry run.
"""

import pytest
import torch
from full_model import FULL_SIZE, random_uniworld
from timing import interleave
from train_step import (
    BENCH,
    CUDA,
    DEVICE,
    DRY_RUN,
    DTYPES,
    ROUNDS,
    SIDE_PX,
    SIZE,
    Ours,
    counts,
    make_batch,
    train_config,
)

from uniworld.train.plan import Sizes, estimate

GIB = 2**30
SIDE = "ours, optimizer in host memory"
OFFLOADED = ["sharding.offload_optimizer=true"]

pytestmark = pytest.mark.skipif(not CUDA and not DRY_RUN, reason="needs a CUDA device (UNIWORLD_BENCH_SIZE=tiny)")


def test_stage2_with_the_optimizer_in_host_memory(report):
    (dtype,) = DTYPES
    config = train_config("stage2", dtype, OFFLOADED)
    model = random_uniworld(SIZE, DEVICE, dtype, use_t5=False)
    batch = make_batch(model, config)
    ours = Ours(model, config, batch)
    first = ours.step(batch)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    samples = interleave({SIDE: [lambda: ours.step(batch)]}, rounds=ROUNDS, sample_s=0.0, device=DEVICE, warmup=0)[SIDE]
    assert ours.loss != first, "the step changes nothing"
    more = {"images_per_s": 1 / samples.median, **counts(ours)}
    if CUDA:
        more["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    if SIZE is FULL_SIZE:
        plan = estimate(train_config("stage2", dtype, [*OFFLOADED, "model.path=published"]), 1, Sizes())
        more |= {"planned_gib": plan.total / GIB, "planned_tensors_gib": plan.tensors / GIB}
    report(BENCH, f"stage2, {SIDE_PX} px, all blocks", SIDE, dtype, samples, **more)
