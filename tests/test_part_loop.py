"""How a part is trained: runs in pieces, killed ones, precisions, and the command."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from parts_of_tiny import ROOT, train
from safetensors.torch import load_file
from torch import nn

from uniworld.config import CheckpointConfig, EMAConfig, OptimConfig
from uniworld.train.checkpoints import complete_checkpoints
from uniworld.train.metrics import read_metrics
from uniworld.train.parts import loop, make_part
from uniworld.train.parts.config import PartConfig


class Line:
    """A part that fits y = 3 x - 1, from noisy points."""

    not_for_making = ("module",)

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Linear(1, 1)

    def make(self, seeds):
        x = torch.tensor(np.stack([np.random.default_rng(seed).normal(size=1) for seed in seeds]), dtype=torch.float32)
        return {"x": x, "y": 3 * x - 1}

    def loss(self, batch, generator):
        noise = torch.randn(batch["y"].shape, generator=generator)
        error = self.module(batch["x"].to(self.module.weight.dtype)) - batch["y"] - 0.1 * noise
        return error.square().mean(), {"largest": error.detach().abs().max()}

    def score(self):
        return {"slope": float(self.module.weight.detach())}

    def export(self, folder):
        torch.save(self.module.state_dict(), folder / "line.pt")


def train_line(config, part=None, **more):
    return train(config, part or Line(), **more)


def line_config(folder, **changes):
    settings = {
        "part": "vae",
        "run_dir": str(folder),
        "num_steps": 20,
        "batch_size": 8,
        "num_workers": 0,
        "log_every_steps": 1,
        "optim": OptimConfig(lr=0.1),
        "ema": EMAConfig(decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=5),
    }
    return PartConfig(**settings | changes)


def final_state(folder):
    last = complete_checkpoints(folder / "checkpoints")[-1]
    return {name: load_file(last.folder / name) for name in (loop.WEIGHTS, loop.AVERAGE)}, last.step


def test_a_line_is_found(tmp_path):
    config = line_config(tmp_path, num_steps=200)
    trainer, code = train_line(config)
    scores, folder = trainer.finish()
    assert code == 0 and scores["slope"] == pytest.approx(3, abs=0.1)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    saved = torch.load(folder / "line.pt", weights_only=True)
    assert float(saved["weight"]) == scores["slope"]
    assert torch.equal(saved["weight"], final_state(tmp_path)[0][loop.AVERAGE]["weight"])  # the average, not the last


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, optimizer):
    optim = OptimConfig(name=optimizer, lr=0.1)
    train_line(line_config(tmp_path / "one", optim=optim))
    pieces = line_config(tmp_path / "pieces", optim=optim, checkpoint=CheckpointConfig(every_steps=100))
    codes = [train_line(pieces, seconds=0)[1] for _ in range(20)]
    assert codes == 19 * [loop.EXIT_STOPPED] + [0]
    assert final_state(tmp_path / "pieces")[1] == 20
    for whole, pieced in zip(final_state(tmp_path / "one")[0].values(), final_state(tmp_path / "pieces")[0].values()):
        assert all(torch.equal(whole[name], pieced[name]) for name in whole)
    logged = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("one", "pieces")]
    assert logged[0] == logged[1] and len(logged[0]) == 20


def test_a_line_of_the_log_has_the_means_of_its_steps(tmp_path):
    """Of those that have a measure: here the even ones."""

    class Turns(Line):
        def make(self, seeds):
            return super().make(seeds) | {"turn": seeds.start // len(seeds)}

        def loss(self, batch, generator):
            loss, more = super().loss(batch, generator)
            turn = batch.pop("turn")
            return loss, more | ({"even": torch.tensor(float(turn))} if turn % 2 == 0 else {})

    train_line(line_config(tmp_path / "each"), Turns())
    train_line(line_config(tmp_path / "ten", log_every_steps=10), Turns())
    each, ten = (list(read_metrics(tmp_path / name)) for name in ("each", "ten"))
    assert [record["step"] for record in ten] == [10, 20] and [record["even"] for record in ten] == [4, 14]
    assert ten[0]["loss"] == pytest.approx(np.mean([record["loss"] for record in each[:10]]), rel=1e-5)
    assert ["even" in record for record in each[:4]] == [True, False, True, False]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    class Mortal(Line):
        def loss(self, batch, generator):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return super().loss(batch, generator)

    mortal = Mortal()
    mortal.left = 13
    with pytest.raises(Killed):
        train_line(line_config(tmp_path / "killed"), mortal)
    train_line(line_config(tmp_path / "killed"))
    train_line(line_config(tmp_path / "one"))
    for whole, pieced in zip(final_state(tmp_path / "one")[0].values(), final_state(tmp_path / "killed")[0].values()):
        assert all(torch.equal(whole[name], pieced[name]) for name in whole)


def test_workers_change_nothing(tmp_path):
    config = PartConfig(part="vae", run_dir=str(tmp_path), num_steps=2, batch_size=2, size_px=64, num_workers=1)
    part = make_part(config)
    (batch,) = list(loop.PartTrainer(replace(config, num_steps=1), part, quiet=True)._batches())
    here = part.make(range(2))
    assert batch.keys() == here.keys() and all(torch.equal(tensor, here[name]) for name, tensor in batch.items())


def test_a_run_may_begin_behind_the_items_of_another(tmp_path):
    config = line_config(tmp_path, num_steps=2, batch_size=4, first_item=40)
    made = []
    with mock.patch.object(Line, "make", lambda self, seeds: made.append(seeds)):
        list(loop.PartTrainer(config, Line(), quiet=True)._batches())
    assert made == [range(40, 44), range(44, 48)]
    with pytest.raises(ValueError, match="first_item=-1: must be at least 0"):
        line_config(tmp_path, first_item=-1)


def test_weights_in_bf16_have_masters_that_are_not_rounded(tmp_path):
    """A step too small for bf16 counts; what is saved, averaged and exported is what is optimized."""
    config = line_config(tmp_path / "bf16", dtype="bf16", num_steps=9, optim=OptimConfig(lr=1e-4))
    trainer, _ = train_line(config)
    plain, _ = train_line(replace(config, run_dir=str(tmp_path / "fp32"), dtype="fp32"))
    start = Line().module.weight.detach()
    moved = [float((weights["weight"] - start).abs()) for weights in final_state(tmp_path / "bf16")[0].values()]
    assert all(0 < by < 2e-3 for by in moved), moved
    assert trainer.part.module.weight.dtype == torch.bfloat16 and trainer.masters[0].dtype == torch.float32
    assert torch.allclose(trainer.masters[0], plain.masters[0], atol=2e-5)
    again = loop.PartTrainer(config, Line(), quiet=True)
    again._restore()
    assert torch.equal(again.masters[0], trainer.masters[0])
    assert torch.equal(again.part.module.weight, trainer.masters[0].bfloat16())
    trainer.finish()
    assert torch.equal(trainer.part.module.weight, trainer.average[0])  # in fp32


def test_tied_weights_are_kept_once_and_come_back(tmp_path):
    """As T5's embedding, which has two names."""

    class Tied(Line):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)})
            self.module["second"].weight = self.module["first"].weight

        def loss(self, batch, generator):
            y = self.module["second"](self.module["first"](batch["x"]))
            return (y - batch["y"]).square().mean(), {}

    first, _ = train_line(line_config(tmp_path, num_steps=20), Tied())
    again = loop.PartTrainer(line_config(tmp_path, num_steps=20), Tied(), quiet=True)
    again._restore()
    assert list(final_state(tmp_path)[0][loop.WEIGHTS]) == ["first.bias", "first.weight", "second.bias"]
    assert torch.equal(again.part.module["second"].weight, first.part.module["first"].weight)
    with pytest.raises(ValueError, match=r"is of another model \(bias"):
        loop.PartTrainer(line_config(tmp_path, num_steps=30), Line(), quiet=True)._restore()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Broken(Line):
        def loss(self, batch, generator):
            loss, more = super().loss(batch, generator)
            return loss * math.nan, more

    with pytest.raises(ValueError, match="step 1: loss nan, its gradient is not finite"):
        train_line(line_config(tmp_path), Broken())


def test_command_stops_in_time_and_goes_on(tmp_path):
    settings = [f"run_dir={tmp_path / 'run'}", "num_steps=3", "size_px=64", "batch_size=1", "num_checked=5"]
    config = str(ROOT / "configs" / "tiny" / "vae.yaml")
    command = [sys.executable, "-m", "uniworld.cli", "train-part", config, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*more):
        return subprocess.run([*command, *more], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)

    stopped = run("num_workers=0", "--minutes", "0")
    assert stopped.returncode == 143 and "stopped after step 1; run again to go on" in stopped.stderr, stopped.stderr
    done = run("num_workers=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    wrong = run("size_px=100")
    assert (wrong.returncode, wrong.stderr) == (2, "error: size_px=100: must be a multiple of 16 from 64 on\n")
