"""The peer of bench/train_step.py computes what the trainer computes: losses, gradients, updates and averages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
