"""Decay schedule and averages against the authors' code and diffusers; shares, memory and swapping on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import case, cases, resolve

from uniworld.config import EMAConfig
from uniworld.train.ema import ALIGNMENT, ShardedEMA, decay_at
from uniworld.train.sharding import Slice

WORKER = Path(__file__).parent / "ema_worker.py"
STEPS = [*range(40), 100, 890, 891, 892, 1000, 9000, 100000]


class Alone:
    """Stands in for `Sharded` in one process: slices are whole tensors."""

    class world:
        device = torch.device("cpu")

    def __init__(self, tensors):
        self.tensors = tensors

    def slices(self, source):
        return [Slice(str(i), 0, 0, t.view(-1)) for i, t in enumerate(self.tensors)]


@pytest.mark.parametrize("name", [c["name"] for c in cases("f_ema") if c["name"].startswith("decay_")])
def test_decay_schedule_of_the_authors(name):
    inputs, outputs = resolve(case("f_ema", name))
    config = EMAConfig(decay=inputs["decay"])
    assert [decay_at(step, config) for step in inputs["steps"]] == outputs["decay"]


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": True},
        {"warmup": True, "inv_gamma": 3.0, "power": 0.75, "decay": 0.9},
        {"min_decay": 0.5},
        {"warmup": True, "min_decay": 0.9},
        {"update_after_step": 7},
        {"update_after_step": 7, "warmup": True, "min_decay": 0.1},
    ],
)
def test_decay_schedule_of_diffusers(settings):
    from diffusers.training_utils import EMAModel

    config = EMAConfig(**settings)
    theirs = EMAModel(
        [torch.nn.Parameter(torch.zeros(1))],
        decay=config.decay,
        min_decay=config.min_decay,
        update_after_step=config.update_after_step,
        use_ema_warmup=config.warmup,
        inv_gamma=config.inv_gamma,
        power=config.power,
    )
    assert [decay_at(step, config) for step in STEPS] == [theirs.get_decay(step) for step in STEPS]


def test_golden_steps_are_exact():
    inputs, outputs = resolve(case("f_ema", "ema_steps"))
    params = inputs["initial_params_flat"].clone()
    trained = [params[:12], params[12:16]]  # the authors copy the frozen rest
    ema = ShardedEMA(Alone(trained), EMAConfig(decay=inputs["decay"], source="params"))
    wanted = outputs["ema_params_flat_after_each_step"]
    for step, values in enumerate(inputs["params_flat_before_each_ema_step"]):
        params.copy_(values)
        decay = ema.update()
        assert decay == outputs["cur_decay_value"][step]
        assert torch.equal(torch.cat([s.tensor for s in ema.slices()]), wanted[step][:16])
    assert ema.num_updates == len(wanted) == 6


def test_neighbours_in_memory_become_one_run():
    flat = torch.randn(100)
    pieces = [flat[:40], flat[40:41], flat[50:100]]
    ema = ShardedEMA(Alone(pieces), EMAConfig())
    assert [a.numel() for a in ema._averages] == [41, 50]
    assert ema.num_bytes == 4 * (48 + 64)
    for mine, piece in zip(ema.slices(), pieces):
        assert torch.equal(mine.tensor, piece)


def test_load_takes_slices_cut_otherwise():
    source = torch.arange(30, dtype=torch.float32)
    ema = ShardedEMA(Alone([torch.zeros(10), torch.zeros(20)]), EMAConfig())
    saved = [("0", 0, source[:4]), ("0", 4, source[4:10]), ("1", 0, source[10:13]), ("other", 0, source)]
    with pytest.raises(ValueError, match="lacks 17 elements"):
        ema.load(saved, 5)
    ema.load([*saved, ("1", 3, source[13:])], 5)
    assert torch.equal(torch.cat([s.tensor for s in ema.slices()]), source)
    assert ema.num_updates == 5


CASES = [(z, dtype, source) for z in (1, 2, 3) for dtype in ("bf16", "fp32") for source in ("master", "params")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ema")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [json.dumps(CASES), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[torch.load(folder / f"{i}-{rank}.pt") for rank in range(2)] for i in range(len(CASES))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_two_ranks(two_ranks, number):
    """Every rank averages its share alone; together the shares are the average of whole parameters."""
    zero_stage, dtype, source = CASES[number]
    ranks = two_ranks[number]
    total, num_tensors = ranks[0]["num_trained"], len(ranks[0]["sources"][0])
    for result in ranks:
        # A rank's share, rounded up to a partition (ZeRO 3 cuts every parameter), and runs to whole pieces.
        padding = 4 * (num_tensors + result["num_runs"] * ALIGNMENT + 2 * ALIGNMENT)
        assert 4 * total / 2 - padding <= result["num_bytes"] <= 4 * total / 2 + padding
        assert result["num_bytes"] >= 4 * result["numel"]
        assert result["collectives"] == 0, "an update must not communicate"
        assert result["launches"] == 1
    assert sum(r["numel"] for r in ranks) == total
    whole = None
    for step, tensors in enumerate(ranks[0]["sources"]):
        decay = decay_at(step, EMAConfig(decay=0.9))  # step 0 is the start
        whole = {
            name: t.float() if whole is None or not decay else whole[name] + (1 - decay) * (t.float() - whole[name])
            for name, t in tensors.items()
        }
    for name, average in ranks[0]["ema"].items():
        assert torch.equal(average, whole[name]), name
    lagging = [not torch.equal(ranks[0]["ema"][n], ranks[0]["sources"][-1][n].float()) for n in whole]
    assert sum(lagging) > num_tensors / 2


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_swapping(two_ranks, number):
    """Inside, the model computes with the average in its own dtype; afterwards every bit is as before."""
    for result in two_ranks[number]:
        assert result["swapped_equals_average"]
        assert result["restored"]
    _, dtype, source = CASES[number]
    inside, outside, after = (two_ranks[number][0][k] for k in ("loss_inside", "loss_before", "loss_after"))
    assert outside == after
    assert inside != outside
    assert inside == two_ranks[number][1]["loss_inside"]


def test_bf16_parameters_round_small_updates_away(two_ranks):
    """Why the average is of master weights: bf16 parameters hide steps that are below their resolution."""
    master, params = (two_ranks[CASES.index((2, "bf16", source))][0]["ema"] for source in ("master", "params"))
    assert any(not torch.equal(master[name], params[name]) for name in master)
