"""What users of `tiny` wait for: its commands from start to end, and the drawing of training data. On the CPU."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from timing import Samples, interleave

from uniworld.data.scenes.make import DataPlan, make_data

ROOT = Path(__file__).resolve().parent.parent
BENCH, KIND, SIDE = "tiny", "cpu", "ours"
ROUNDS, NUM_PAIRS = 5, 600
COMMANDS = {
    "edit": ("edit", "examples/scene.png", "make the red ball blue", "-o", "edited.png"),
    "generate": ("generate", "a blue ball on a beach", "-o", "drawn.png"),
    "perceive": ("perceive", "examples/scene.png", "depth", "-o", "depth.png"),
    "chat": ("chat", "what color is the ball?", "--image", "examples/scene.png", "--mode", "text"),
}
TASKS = {"all tasks": ("understanding", "t2i", "edit", "perceive", "compose"), "edits": ("edit",)}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, report):
    report(BENCH, f"uniworld {name}", SIDE, torch.float32, command_samples()[name], kind=KIND)


@functools.cache
def command_samples() -> dict[str, Samples]:
    """Of all commands in turn."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: [functools.partial(run, words, Path(folder))] for name, words in COMMANDS.items()}
        return interleave(sides, rounds=ROUNDS, sample_s=0.0, warmup=1)


def run(words: tuple[str, ...], folder: Path) -> None:
    """One process, as a user starts it; pictures it writes go to `folder`."""
    given = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    given = [str(folder / word) if before == "-o" else word for before, word in zip(["", *given], given)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "uniworld.cli", *given], check=True, capture_output=True, env=env)


@pytest.mark.parametrize("name", TASKS)
def test_make_data(name, report, tmp_path):
    """Pairs drawn and written as shards, a process a core."""
    num_workers, folders = os.cpu_count() or 1, iter(range(100))

    def draw() -> None:
        plan = DataPlan(num=NUM_PAIRS, tasks=TASKS[name], format="webdataset")
        make_data(plan, tmp_path / str(next(folders)), num_workers=num_workers)

    samples = interleave({SIDE: [draw]}, rounds=ROUNDS, sample_s=0.0, warmup=1)[SIDE]
    case = f"make-data, {NUM_PAIRS} pairs, {name}"
    report(BENCH, case, SIDE, torch.float32, samples, kind=KIND, pairs_per_s=NUM_PAIRS / samples.median)
