"""The peer of bench/train_step.py computes what the trainer computes: losses, gradients, updates and averages."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from uniworld.config import load_config
from uniworld.train.plan import Sizes, estimate

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def found(request):
    pytest.importorskip("diffusers")
    pytest.importorskip("deepspeed")
    command = [sys.executable, str(HERE / "train_bench_worker.py"), request.param]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_sides_compute_the_same(found):
    for ours, plain in found["losses"]:
        assert ours == pytest.approx(plain, rel=1e-4)
    assert found["losses"][0][0] != found["losses"][-1][0]
    assert found["agreement"]["norm_difference"] < 1e-4
    assert found["agreement"]["gradient_error"] < 1e-3


def test_parameters_and_averages_move_alike(found):
    """Adam divides by the gradient's size, so that the smallest gradients make the largest differences."""
    assert found["update_error"] < 2e-3
    assert found["ema_error"] < 2e-3


def test_both_train_the_same_parameters(found):
    assert found["frozen_stayed"]
    assert found["num_trained"]["ours"] == found["num_trained"]["plain"] > 0
    assert found["num_averaged"]["all"] > 2 * found["num_averaged"]["ours"]


@pytest.fixture
def train_step(monkeypatch):
    """The module `bench/train_step.py` at toy size."""
    pytest.importorskip("diffusers")
    pytest.importorskip("deepspeed")
    monkeypatch.syspath_prepend(str(HERE.parent / "bench"))
    monkeypatch.setenv("UNIWORLD_BENCH_SIZE", "tiny")
    import train_step

    return train_step


def test_sides_that_do_not_fit_together_are_measured_in_smaller_groups(train_step, monkeypatch):
    """A card that holds less and less: the comparison is kept as long as it fits."""
    sizes = {"ours": 2, "ours, precomputed states": 0, "plain": 9, "plain, EMA of the trained alone": 3}
    sizes[train_step.PLAIN_KEPT] = 1

    def measured_on(card):
        def run_sides(sides, stage, dtype, measured):
            if sum(sizes[side] for side in sides) > card:
                raise train_step.torch.OutOfMemoryError("out of memory\nand so on")
            measured.samples |= dict.fromkeys(sides)

        monkeypatch.setattr(train_step, "run_sides", run_sides)
        return train_step.measure.__wrapped__("stage1", train_step.torch.float32)

    all_sides = measured_on(15)
    assert all_sides.groups == [train_step.SIDES] and all(map(all_sides.interleaved, train_step.SIDES))
    alone = measured_on(9)
    assert alone.groups == [train_step.COMPARED, ("plain",)] and not alone.failed
    assert alone.interleaved("ours") and not alone.interleaved("plain")
    small = measured_on(6)
    assert small.groups == [train_step.COMPARED] and small.failed == {"plain": "out of memory"}
    smallest = measured_on(2)
    assert smallest.samples.keys() == {"ours", "ours, precomputed states"} and not smallest.interleaved("ours")


@pytest.mark.parametrize("memory_gib, blocks", [(79.1, (4, 8)), (139.7, (10, 20))])
def test_stage_2_fits_both_sides_on_one_card(train_step, memory_gib, blocks):
    """By the planner's count of parameters and the bytes that the bench states."""
    assert train_step.stage2_blocks(memory_gib) == blocks
    config = load_config(HERE.parent / "configs" / "stage2_512.yaml", ["model.path=published", "model.use_t5=false"])
    denoiser = replace(Sizes().model.denoiser, num_layers=blocks[0], num_single_layers=blocks[1])
    plan = estimate(config, 1, replace(Sizes(), model=replace(Sizes().model, denoiser=denoiser)))
    needed = 2 * plan.num_parameters + 48 * plan.num_trained + plan.static["frozen encoders"]
    assert 0.8 < needed / (memory_gib * 2**30) < 0.95
