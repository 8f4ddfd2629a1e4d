"""The recipe of `tiny`: its steps go on where they stopped, and what they make is a model that draws."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from uniworld.checkpoint import precision
from uniworld.cli_train_part import as_this_machine_computes
from uniworld.config import load_config
from uniworld.data.shards import expand_shards
from uniworld.engine import Engine
from uniworld.train.parts.config import load_part_config
from uniworld.train.parts.recipe import DRAWN_TASKS, Recipe, Step, recipe, sources_in, take_finished
from uniworld.train.parts.start import write_start
from uniworld.train.parts.wider import widened
from uniworld.train.signals import EXIT_STOPPED

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_steps": 2, "num_checked": 32, "num_workers": 0, "batch_size": 2, "log_every_steps": 1}


def calls(root, *names):
    """Steps that write their names down."""

    def record(name):
        with (root / "calls").open("a") as file:
            file.write(f"{name} ")

    return tuple(Step(name=name, function=lambda name=name: record(name)) for name in names)


def test_steps_run_in_order_and_once(tmp_path):
    notes = []
    steps = calls(tmp_path, "a", "b", "c")
    assert Recipe(tmp_path, steps, notes.append).run() == 0
    assert Recipe(tmp_path, steps).run() == 0
    assert (tmp_path / "calls").read_text() == "a b c "
    assert notes[0] == "[1/3] a: in this process" and Recipe(tmp_path, steps).done == ["a", "b", "c"]


def test_a_step_that_fails_is_named_and_tried_again(tmp_path):
    wrong = Step(name="export", command=("export", str(tmp_path / "nothing"), "-o", str(tmp_path / "out")))
    steps = (*calls(tmp_path, "a"), wrong)
    with pytest.raises(ValueError, match="export: failed with exit code 2; the same command tries it again"):
        Recipe(tmp_path, steps).run()
    assert Recipe(tmp_path, steps).done == ["a"]


def test_time_ends_a_step_that_then_goes_on(tmp_path):
    config = tmp_path / "vae.yaml"
    settings = SMALL | {"part": "vae", "run_dir": str(tmp_path / "vae"), "num_steps": 100_000, "size_px": 64}
    config.write_text(yaml.safe_dump(settings))
    steps = (Step(name="vae", command=("train-part", str(config), "-q")), *calls(tmp_path, "after"))
    for seconds in (0, 15, 60, 200):  # a step that has not begun to train when it is stopped has nothing to save
        assert Recipe(tmp_path, steps).run(seconds) == EXIT_STOPPED and Recipe(tmp_path, steps).done == []
        if saved := list((tmp_path / "vae" / "checkpoints").glob("step-*")):
            break
    assert saved and not (tmp_path / "calls").exists()


def test_the_command_lists_its_steps_and_stops_on_a_signal(tmp_path):
    command = [sys.executable, "-m", "uniworld.cli", "train-tiny", "-o", str(tmp_path / "run")]
    listed = subprocess.run([*command, "--steps"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[2] for line in listed.stdout.splitlines()]
    assert names == [step.name for step in recipe(tmp_path, Path("configs/tiny"), 1)] and len(names) == 14
    wrong = subprocess.run([*command, "--configs", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (wrong.returncode, wrong.stderr) == (2, "error: configs=docs: has no vae.yaml\n")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert "[1/14] vae: train-part configs/tiny/vae.yaml" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == EXIT_STOPPED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_stage_2_names_a_share_of_every_task_that_is_drawn(tmp_path):
    config, shards = ROOT / "configs" / "tiny" / "stage2.yaml", tmp_path / "some [1] shards"
    listed = load_config(config, [sources_in(shards, config, 1000)]).data.sources
    assert {Path(source.path).name.split("-")[0] for source in listed} == set(DRAWN_TASKS.split(","))
    assert sum(source.weight for source in listed) == pytest.approx(1)
    shards.mkdir()
    for task in DRAWN_TASKS.split(","):
        (shards / f"{task}-00000.tar").touch()
    found = [path for source in listed for path in expand_shards(source.path)]
    assert sorted(found) == sorted(shards.iterdir())
    (few,) = load_config(config, [sources_in(shards, config, 1)]).data.sources
    assert Path(few.path).name == "edit-*.tar"


@pytest.mark.parametrize("name", ["vlm", "semantic_encoder", "stage2"])
def test_wider_steps_see_the_same_items(name):
    """Four times the batch: twice the rates, a fourth of the steps, and as much is forgotten with each item."""
    path = ROOT / "configs" / "tiny" / f"{name}.yaml"
    load = load_config if name == "stage2" else load_part_config
    as_written, wide = load(path), load(path, widened(path, 4))
    sizes = [c.data.batch_size if name == "stage2" else c.batch_size for c in (as_written, wide)]
    assert sizes[1] == 4 * sizes[0] and wide.num_steps * sizes[1] == as_written.num_steps * sizes[0]
    assert wide.optim.warmup_steps == as_written.optim.warmup_steps / 4
    assert wide.ema.decay == pytest.approx(as_written.ema.decay**4, abs=1e-6)
    assert wide.optim.lr == pytest.approx(2 * as_written.optim.lr)
    times = 1 if name == "stage2" else 2  # the rate of Muon, where it is used
    assert wide.optim.muon_lr == pytest.approx(times * as_written.optim.muon_lr)
    assert widened(path, 1) == ()
    steps = recipe(Path("runs"), path.parent, 1, 4)
    assert any("train" in step.command[:1] and "optim.warmup_steps=25" in step.command for step in steps)


def test_without_bf16_products_the_stages_and_their_states_are_in_fp32():
    configs = ROOT / "configs" / "tiny"
    as_written, fp32 = (recipe(Path("runs"), configs, 1, stage_dtype=dtype) for dtype in (None, "fp32"))
    changed = {a.name: set(b.command) - set(a.command) for a, b in zip(as_written, fp32) if a.command != b.command}
    assert changed == {name: {"sharding.dtype=fp32"} for name in ("states", "stage1", "stage2")}
    assert load_config(configs / "stage2.yaml", ["sharding.dtype=fp32"]).sharding.dtype == "fp32"


@pytest.mark.parametrize(
    ("machine", "cpu_has", "trained"),
    [("cpu", False, "fp32"), ("cpu", True, "autocast"), ("cuda", False, "autocast")],
)
def test_a_part_is_trained_in_what_the_machine_computes_in(machine, cpu_has, trained, monkeypatch, capsys):
    monkeypatch.setattr(precision, "default_device", lambda: torch.device(machine))
    monkeypatch.setattr(precision, "cpu_has_fast_bf16", lambda: cpu_has)
    config = load_part_config(ROOT / "configs" / "tiny" / "vae.yaml")
    assert config.dtype == "autocast" and as_this_machine_computes(config, quiet=False).dtype == trained
    said = "dtype=autocast: fp32 here, for this CPU does not compute in bf16\n" if trained == "fp32" else ""
    assert capsys.readouterr().err == said


@pytest.mark.long
def test_the_recipe_from_nothing_to_an_edit(tmp_path):
    """All steps with two optimizer steps each; the model is complete and draws."""
    configs, root = tmp_path / "configs", tmp_path / "runs"
    shutil.copytree(ROOT / "configs" / "tiny", configs)
    for path in configs.glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        if "part" in settings:
            settings |= SMALL
        else:
            settings |= {"num_steps": 2, "log_every_steps": 1}
            settings["data"]["batch_size"] = 2
        path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "uniworld.cli", "train-tiny", "-o", str(root), "--configs", str(configs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--num", "12", "-q"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(root / "model")
    again = subprocess.run([*command, "--num", "12"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stderr == ""
    assert json.loads((root / "model" / "config.json").read_text())["uniworld"]["random_weights"] is False
    assert not list((root / "model").glob("*_projector.*"))  # they are in the model's own files
    engine = Engine.from_pretrained(str(root / "model"), progress=False)
    result = engine.edit(Image.new("RGB", (128, 128), "grey"), "make the ball red", num_inference_steps=2, seed=0)
    assert result.images[0].size == (128, 128)
    assert 0 <= engine.chat([{"role": "user", "content": "draw a cube"}], num_inference_steps=1).draw_probability <= 1


def test_finished_parts_are_copied_and_not_trained(tmp_path):
    finished, root = tmp_path / "finished", tmp_path / "root"
    for name in ("words", "vae/model", "vlm/model", "base"):  # the base is not finished
        (finished / name).mkdir(parents=True)
    (finished / "words" / "ids.json").write_text("{}")
    (finished / "vae" / "model" / "config.json").write_text("1")
    (root / "vlm").mkdir(parents=True)  # a run of its own
    assert take_finished(root, finished) == ["vae"]
    assert (root / "vae" / "model" / "config.json").read_text() == "1" and (root / "words" / "ids.json").is_file()
    runner = Recipe(root, calls(root, "vae", "vlm"))
    runner.count_as_done(["vae"])
    assert runner.run() == 0 and (root / "calls").read_text() == "vlm "
    (root / "words" / "ids.json").write_text("{'other': 1}")
    with pytest.raises(ValueError, match="learned other words"):
        take_finished(root, finished)


def test_a_start_needs_every_part(tmp_path):
    with pytest.raises(FileNotFoundError, match="vlm/model is not there; train it first"):
        write_start(tmp_path, tmp_path / "start")
    assert not (tmp_path / "start").exists()
