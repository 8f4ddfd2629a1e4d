"""Validation pictures: of the averaged weights, through the engine, and without a trace in the training."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFont

from uniworld.checkpoint.load import load_uniworld
from uniworld.config import TrainConfig, from_dict
from uniworld.engine.engine import Engine
from uniworld.train import validate
from uniworld.train.metrics import read_metrics

HERE = Path(__file__).parent
VALIDATION = {"every_steps": 2, "prompts": ["a cat", "make it red " * 40], "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return load_uniworld(dtype="float32", progress=False)


def make_config(run_dir, **validation):
    tree = {"run_dir": str(run_dir), "data": {"anchor_px": 64 * 64}, "validation": VALIDATION | validation}
    return from_dict(TrainConfig, tree)


@pytest.fixture
def references(tmp_path):
    """Two pictures of one colour each, of different ratios."""
    paths = [tmp_path / "wide.png", tmp_path / "high.png"]
    Image.new("RGB", (128, 72), (250, 10, 10)).save(paths[0])
    Image.new("RGB", (64, 96), (10, 10, 250)).save(paths[1])
    return [str(path) for path in paths]


class LoneWorld:
    rank, size, device = 0, 1, torch.device("cpu")

    def agree(self, flag):
        return flag


class Swap:
    """An average that scales the DiT's last layer, as `ShardedEMA.swapped_in` overwrites parameters."""

    def __init__(self, model):
        self.weight = model.denoiser.proj_out.weight

    def swapped_in(self):
        from contextlib import contextmanager

        @contextmanager
        def swapped():
            kept = self.weight.clone()
            with torch.no_grad():
                self.weight.mul_(0.5)
            yield
            with torch.no_grad():
                self.weight.copy_(kept)

        return swapped()


def test_draws_what_the_engine_draws(model, tmp_path, references):
    config = make_config(tmp_path, images=references)
    drawn = validate.draw(config, model)
    assert [p.height < p.width for p in drawn] == [True, False]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.5, "seed": 3}
    for prompt, path, picture in zip(config.validation.prompts, references, drawn):
        expected = Engine(model).edit(path, prompt, height=picture.height, width=picture.width, **settings)
        assert np.array_equal(np.array(picture), np.array(expected.images[0]))


def test_the_average_is_drawn_and_nothing_is_left_behind(model, tmp_path):
    config = make_config(tmp_path)
    model.denoiser.attention_backend = "auto"
    before = {name: p.clone() for name, p in model.denoiser.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plain = validate.draw(config, model)
    path = validate.run(config, model, Swap(model), LoneWorld(), 40)
    assert torch.equal(state, torch.get_rng_state())
    assert model.denoiser.attention_backend == "auto"
    assert all(torch.equal(p, before[name]) for name, p in model.denoiser.named_parameters())
    assert path == tmp_path / "validation" / "step-000040.png" and [*path.parent.iterdir()] == [path]
    averaged = np.array(Image.open(path)).astype(int)
    current = np.array(validate.grid(config.validation, plain, "step 40, averaged weights")).astype(int)
    assert averaged.shape == current.shape and (averaged != current).any()
    with Swap(model).swapped_in():
        expected = validate.grid(config.validation, validate.draw(config, model), "step 40, averaged weights")
    assert np.array_equal(averaged, np.array(expected))


def test_grid_shows_references_above_pictures_in_columns(tmp_path, references):
    config = make_config(tmp_path, images=references).validation
    pictures = [Image.new("RGB", (64, 64), (0, 200, 0)), Image.new("RGB", (64, 64), (200, 200, 0))]
    sheet = validate.grid(config, pictures, "step 1")
    cell, gap = validate.CELL_PX, validate.MARGIN_PX
    assert sheet.width == gap + 2 * (cell + gap)

    def rows_of(colour, column):
        x = gap + cell // 2 + column * (cell + gap)
        return [y for y in range(sheet.height) if sheet.getpixel((x, y)) == colour]

    assert max(rows_of((250, 10, 10), 0)) < min(rows_of((0, 200, 0), 0))
    assert max(rows_of((10, 10, 250), 1)) < min(rows_of((200, 200, 0), 1))


def test_long_prompts_are_cut(tmp_path):
    font = ImageFont.load_default(size=15)
    lines = validate.wrapped("make it red " * 40, font).splitlines()
    assert len(lines) == validate.MAX_CAPTION_LINES and lines[-1].endswith("…")
    assert all(font.getlength(line) <= validate.CELL_PX for line in lines)
    assert validate.wrapped("a cat", font) == "a cat"


def test_mistakes_are_found_before_training(tmp_path, references):
    validate.check(make_config(tmp_path, images=references))
    with pytest.raises(ValueError, match="validation.every_steps=2: needs validation.prompts"):
        validate.check(make_config(tmp_path, prompts=[]))
    with pytest.raises((ValueError, OSError), match="none.png"):
        validate.check(make_config(tmp_path, images=[references[0], str(tmp_path / "none.png")]))
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        validate.check(make_config(tmp_path, num_inference_steps=0))


def test_a_failure_names_the_step_and_leaves_the_weights(model, tmp_path, monkeypatch):
    before = model.denoiser.proj_out.weight.clone()
    (tmp_path / "validation").touch()  # no folder can be made here
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="validation at step 4: .*validation"):
        validate.run(config, model, Swap(model), LoneWorld(), 4)
    assert torch.equal(model.denoiser.proj_out.weight, before)


def train(tmp_path, name, ranks, *overrides):
    config = tmp_path / f"{name}.yaml"
    tree = {
        "run_dir": str(tmp_path / name),
        "num_steps": 5,
        "model": {"path": "tiny"},
        "data": {"anchor_px": 64 * 64},
        "stage": {"preset": "stage2"},
        "optim": {"lr": 1e-3},
        "sharding": {"dtype": "fp32"},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 100},
    }
    config.write_text(yaml.safe_dump(tree))
    command = [str(HERE / "train_fakes.py"), "train", str(config), *overrides]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name)]
    return losses, sorted((tmp_path / name / "validation").glob("*")) if overrides else []


@pytest.mark.slow
@pytest.mark.parametrize("ranks, zero_stage", [(1, 2), (2, 2), (2, 3)])
def test_a_run_is_the_same_with_and_without_pictures(tmp_path, ranks, zero_stage):
    pytest.importorskip("deepspeed")
    zero = f"sharding.zero_stage={zero_stage}"
    every = "validation={every_steps: 2, prompts: [a cat], num_inference_steps: 2}"
    losses, files = train(tmp_path, "with", ranks, zero, every)
    assert [path.name for path in files] == ["step-000002.png", "step-000004.png"]
    first, second = (np.array(Image.open(path)).astype(int) for path in files)
    assert (first[60:] != second[60:]).any()  # below the title: the weights have moved
    assert losses == train(tmp_path, "without", ranks, zero, "validation={every_steps: 0}")[0]
