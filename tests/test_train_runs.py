"""Whole runs of the command `train` on the model tiny, as processes: stopping, going on, and what ends a run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from data_files import write_authors
from safetensors.torch import load_file

from uniworld.checkpoint import precision
from uniworld.config import TrainConfig, from_dict
from uniworld.train.metrics import read_metrics

pytest.importorskip("deepspeed")

HERE = Path(__file__).parent
SETTINGS = {
    "num_steps": 6,
    "model": {"path": "tiny"},
    "data": {"anchor_px": 64 * 64},
    "sharding": {"dtype": "fp32"},
    "checkpoint": {"every_steps": 2},
}


def train(run_dir, *overrides, ranks=1, fake="{}"):
    """The finished process of one run on random pictures."""
    config = run_dir.parent / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | {"run_dir": str(run_dir)}))
    command = [str(HERE / "train_fakes.py"), "train", str(config), *overrides]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRAIN_FAKE": fake, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200
    )


def losses(run_dir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run_dir)]


def checkpoints(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def average(run_dir, step, ranks):
    files = [run_dir / f"checkpoints/step-{step:08d}/ema/rank-{r:05d}.safetensors" for r in range(ranks)]
    return [load_file(file) for file in files]


def test_a_signal_ends_a_run_with_143(tmp_path):
    done = train(tmp_path / "run", "checkpoint.every_steps=100", fake='{"signal": [1]}')
    assert done.returncode == 143, done.stderr
    assert "stopped by signal after step 2; run again to go on" in done.stderr
    assert checkpoints(tmp_path / "run") == ["step-00000002"]


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    """SIGTERM reaches the last rank while it reads batch 3, the fourth; all ranks finish step 4 and save."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(whole, "stage.preset=stage2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "stage2: trains " in done.stderr and "starts anew, 6 steps in all" in done.stderr
    assert checkpoints(whole) == ["step-00000002", "step-00000004", "step-00000006"]

    first = train(stopped, "stage.preset=stage2", "checkpoint.every_steps=100", ranks=2, fake='{"signal": [3]}')
    assert first.returncode == 1 and first.stderr.count("exitcode  : 143") == 2, first.stderr  # 1 is torchrun's own
    assert "stopped by signal after step 4; run again to go on" in first.stderr
    assert checkpoints(stopped) == ["step-00000004"]
    second = train(stopped, "stage.preset=stage2", ranks=2)
    assert second.returncode == 0, second.stderr
    assert "goes on from step-00000004" in second.stderr
    assert losses(stopped) == losses(whole)
    for mine, theirs in zip(average(stopped, 6, ranks=2), average(whole, 6, ranks=2)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("dtype, fast, warned", [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_a_run_in_a_bf16_that_is_emulated_says_so(dtype, fast, warned, monkeypatch):
    from uniworld.train.trainer import Trainer

    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: fast)
    lines = []
    run = SimpleNamespace(
        config=from_dict(TrainConfig, {"sharding": {"dtype": dtype}}),
        world=SimpleNamespace(size=1, device=torch.device("cpu")),
        sharded=SimpleNamespace(num_trained=1),
        num_parameters=2,
        restored=None,
        metrics=SimpleNamespace(note=lines.append),
    )
    Trainer._announce(run)
    said = "sharding.dtype=bf16: this CPU does not compute in bf16 and is far faster with fp32"
    assert (lines[-1] == said) == warned and len(lines) == 3 + warned


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do(tmp_path):
    for _ in range(2):
        done = train(tmp_path / "run", "num_steps=2")
        assert done.returncode == 0, done.stderr
    assert "goes on from step-00000002, 2 steps in all" in done.stderr
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]


def test_bad_steps_are_skipped_and_too_many_in_a_row_end_the_run(tmp_path):
    run = tmp_path / "run"
    done = train(run, "max_bad_steps=3", "num_steps=20", ranks=2, fake='{"nan": [1, 2, 4, 5, 6]}')
    assert done.returncode == 1
    expected = (
        "error: max_bad_steps=3: loss or gradient was not finite in as many steps in a row, up to step 7; "
        f"the last good checkpoint is {run}/checkpoints/step-00000006"
    )
    assert done.stderr.count(expected) == 2
    records = list(read_metrics(run))
    assert [r["skipped_steps"] for r in records] == [0, 1, 2, 2, 3, 4]
    assert [r["loss"] is None for r in records] == [False, True, True, False, True, True]
    parameters = [average(run, step, 2)[0] for step in (2, 4, 6)]
    assert all(value.isfinite().all() for values in parameters for value in values.values())
    assert all(torch.equal(parameters[1][name], parameters[2][name]) for name in parameters[1])  # steps 5 and 6
    assert not all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])  # step 4


def test_an_error_on_one_rank_ends_all(tmp_path):
    done = train(tmp_path / "run", ranks=2, fake='{"fail": [2]}')
    assert done.returncode == 1
    assert "error: batch 2 cannot be read" in done.stderr
    assert "error: rank 1 failed; see its error" in done.stderr
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]


def test_mistakes_are_one_line_and_exit_2(tmp_path):
    for override, message in (
        ("optim.learning_rate=1", "optim.learning_rate: unknown key"),
        ("optim.name=adamw8bit", "optim.name=adamw8bit: "),
    ):
        done = train(tmp_path / "run", override)
        if override.endswith("8bit") and "is missing" not in done.stderr:
            continue  # it is installed
        assert done.returncode == 2, done.stderr
        error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(error) == 1 and message in error[0]
        assert "Traceback" not in done.stderr


def train_on_files(tmp_path, *overrides):
    """The finished process of `uniworld train configs/tiny_stage1.yaml` on the data set in `tmp_path`."""
    settings = {
        "run_dir": tmp_path / "run",
        "data.sources": f"[{{path: {tmp_path / 'data.txt'}}}]",
        "data.anchor_px": 64 * 64,
        "data.vlm_max_px": 112 * 112,
    }
    command = [sys.executable, "-m", "uniworld.cli", "train", str(HERE.parent / "configs" / "tiny_stage1.yaml")]
    return subprocess.run(
        [*command, *(f"{key}={value}" for key, value in settings.items()), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_loss_falls_on_real_files(tmp_path):
    """Two pictures again and again, at nearly one noise level, so that the loss moves by what is learned."""
    write_authors(tmp_path, [0, 0])
    done = train_on_files(tmp_path, "num_steps=40", "flow.logit_std=0.1", "checkpoint.every_steps=40")
    assert done.returncode == 0, done.stderr
    got = [loss for _, loss, _ in losses(tmp_path / "run")]
    assert sum(got[-10:]) / 10 < 0.93 * sum(got[:5]) / 5
    assert checkpoints(tmp_path / "run") == ["step-00000040"]
    table = (HERE.parent / "docs" / "training.md").read_text().split("## What a run writes")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == next(read_metrics(tmp_path / "run")).keys()
    assert "finished after step 40; make a model of it with: uniworld export " in done.stderr


def test_bad_samples_over_the_share_are_shown_in_a_table(tmp_path):
    write_authors(tmp_path, [0, 1, 1, 1])
    broken = tmp_path / "edits-images" / "1.png"
    broken.write_bytes(b"no picture")
    done = train_on_files(tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("source  "))
    assert lines[header].split()[1:3] == ["samples", "unusable"] and lines[header + 1].split()[1:3] == ["4", "1"]
    assert any("last bad samples" in line for line in lines) and str(broken) in done.stderr
    assert [line for line in lines if line.startswith("error:")] == [
        "error: data.max_bad_share=0.01: 1 of 4 samples cannot be used"
    ]


def test_data_that_is_not_there_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    from uniworld.config import TrainConfig, from_dict
    from uniworld.train import build
    from uniworld.train.trainer import Trainer

    monkeypatch.setattr(build, "load_parts", lambda *_: pytest.fail("the model was loaded"))
    tree = SETTINGS | {"run_dir": str(tmp_path / "run")}
    for data, message in (
        ({"sources": [{"path": "nowhere.txt"}]}, r"data.sources\[0\].path=nowhere.txt: no such file or folder"),
        ({}, "data.sources: must name at least one source"),
        ({"precomputed": "nowhere"}, "data.precomputed=nowhere: holds no manifest.json"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Trainer(from_dict(TrainConfig, tree | {"data": data})).run()
