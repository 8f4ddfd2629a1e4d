"""The memory planner against what DeepSpeed really allocates for small models on a CPU, and the command `plan`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_worker import SHAPE, batch_shape

from uniworld import cli
from uniworld.checkpoint.load import load_uniworld
from uniworld.config import TrainConfig, from_dict, load_config
from uniworld.train.plan import GIB, Sizes, estimate, recommend, sizes_of

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.10


def case(stage, zero_stage, dtype="bf16", **sharding):
    sharding |= {"zero_stage": zero_stage, "dtype": dtype}
    return {"stage": {"preset": stage}, "data": {"batch_size": 4}, "sharding": sharding}


CASES = {
    "stage1": case("stage1", 2),
    "stage1 ZeRO 3": case("stage1", 3),
    "stage2 ZeRO 1": case("stage2", 1),
    "stage2 ZeRO 2 fp32": case("stage2", 2, "fp32"),
    "stage2 ZeRO 3 fp32": case("stage2", 3, "fp32"),
    "recomputed": case("stage2", 2, checkpoint_blocks=["double", "single"]),
    "accumulated ZeRO 1": case("stage2", 1, accumulation_steps=2),
    "accumulated ZeRO 2": case("stage2", 2, accumulation_steps=2),
    "accumulated ZeRO 3": case("stage2", 3, accumulation_steps=2),
    "prodigy": case("stage2", 2) | {"optim": {"name": "prodigy", "lr": 1.0}},
    "LoRA": case("lora", 2) | {"model": {"lora_rank": 8}},
    "without EMA": case("stage2", 2) | {"ema": {"enabled": False}},
    "offloaded": case("stage2", 2, offload_optimizer=True),
    "offloaded, accumulated": case("stage2", 2, offload_optimizer=True, accumulation_steps=2),
}
# Of one rank the allocator's own events; of two the living storages, as gloo frees on threads that nobody records.
MEASURES = {1: "profiler", 2: "live"}


@pytest.fixture(scope="module", params=MEASURES, ids=lambda n: f"{n} ranks")
def measured(request):
    """(number of ranks, {case: measured peak in bytes})."""
    ranks = request.param
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "tests" / "memory_worker.py"), MEASURES[ranks], *map(json.dumps, CASES.values())]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return ranks, dict(zip(CASES, json.loads(done.stdout.splitlines()[-1])))


def planned(tree, ranks):
    """The estimate of a run from precomputed states, as the worker makes it."""
    config = from_dict(TrainConfig, tree)
    shape = batch_shape(config)
    config = replace(config, data=replace(config.data, precomputed=("states",)))
    return estimate(config, ranks, Sizes(model=SHAPE), shape)


def test_estimates_are_within_ten_percent_of_what_is_measured(measured):
    ranks, peaks = measured
    plans = {name: planned(tree, ranks) for name, tree in CASES.items()}  # on a CPU all of it is host memory
    ratios = {name: (plan.tensors + plan.host) / peaks[name] for name, plan in plans.items()}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), ratios


def test_settings_change_what_is_measured(measured):
    """The cases are far enough apart for the test above to tell them from one another."""
    _, peaks = measured
    assert peaks["recomputed"] < 0.8 * peaks["accumulated ZeRO 2"]
    assert peaks["stage1"] < 0.8 * peaks["stage2 ZeRO 1"] < 0.8 * peaks["stage2 ZeRO 2 fp32"]


def test_published_sizes_are_those_of_the_configs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import full_model

    monkeypatch.setattr(full_model, "materialise", lambda *_: None)  # stays on meta
    monkeypatch.setattr(full_model, "fill_random", lambda *_, **__: None)
    model = full_model.random_uniworld(full_model.FULL_SIZE, "meta", torch.bfloat16)
    found = {
        "vlm": model.vlm,
        "siglip": model.semantic_encoder,
        "clip": model.text_encoders.clip,
        "t5": model.text_encoders.t5,
        "vae": model.vae,
    }
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()}
    assert counts == {name: getattr(Sizes(), name) for name in counts}
    assert Sizes().model.denoiser == model.denoiser.config


def test_a_model_on_this_machine_is_measured_from_its_files():
    config = TrainConfig()  # tiny
    sizes, model = sizes_of(config), load_uniworld("tiny", use_t5=True)
    parts = {"vlm": model.vlm, "siglip": model.semantic_encoder, "vae": model.vae, "t5": model.text_encoders.t5}
    assert {name: getattr(sizes, name) for name in parts} == {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()
    }
    assert sizes.model.denoiser == model.denoiser.config and sizes.source != Sizes().source


STAGE2 = (str(ROOT / "configs" / "stage2_512.yaml"), "model.path=published")
TINY = (str(ROOT / "configs" / "tiny_stage2.yaml"), "data.batch_size=8", "sharding.checkpoint_blocks=[]")


def test_a_recommendation_fits():
    config = load_config(TINY[0], TINY[1:])
    needs = estimate(config, 8).total
    found = recommend(config, 8, needs - 1)
    assert found is not None
    plan, changed = found
    assert plan.total < needs and changed != config
    assert estimate(changed, 8).total == plan.total
    assert recommend(config, 8, 1) is None


def test_an_offloaded_optimizer_leaves_the_gpu():
    """What stays on it are weights; in host memory are 4 bytes a trained parameter of master, gradient and average
    each, 8 of moments, 2 of the copy that goes to the GPU, and a buffer for the largest gradient."""
    overrides = ("sharding.offload_optimizer=false", "sharding.offload_optimizer=true")
    plain, offloaded = (estimate(load_config(STAGE2[0], [*STAGE2[1:], override]), 1) for override in overrides)
    T = plain.num_trained
    assert offloaded.host == pytest.approx((4 + 4 + 4 + 8 + 2) * T, rel=0.01) and plain.host == 0
    weights = plain.static["DiT and connectors"] + plain.static["frozen encoders"]
    assert sum(offloaded.static.values()) == pytest.approx(weights, rel=0.01)
    assert offloaded.passing["backward pass"] < plain.passing["backward pass"] - T  # no share of the gradients
    assert offloaded.total < 80 * 1e9 < plain.total


def test_stage2_fits_one_gpu_with_an_offloaded_optimizer(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, *STAGE2, "--gpus", "1")
    assert code == 1 and shown.out.splitlines()[-1].endswith("with: sharding.offload_optimizer=True")
    code, shown = run(monkeypatch, capsys, *STAGE2, "--gpus", "1", "sharding.offload_optimizer=true")
    assert code == 0 and "in host memory, for each GPU" in shown.out
    prodigy = load_config(STAGE2[0], [*STAGE2[1:], "optim.name=prodigy", "optim.lr=1.0"])
    assert recommend(prodigy, 1, 80 * GIB) is None


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["uniworld", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_command_says_what_it_takes_and_whether_it_fits(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, *STAGE2, "--gpus", "8")
    total = estimate(load_config(*STAGE2[:1], STAGE2[1:]), 8).total / GIB
    assert code == 0 and shown.err == ""
    assert "fits 80 GiB" in shown.out and f"{total:.1f}" in shown.out
    for part in ("EMA", "optimizer state", "frozen encoders", "backward pass", "4,104,933,632 of 12,060,300,352"):
        assert part in shown.out


def test_command_names_settings_that_fit(monkeypatch, capsys):
    config = load_config(TINY[0], TINY[1:])
    memory = str((estimate(config, 8).total - 1) / GIB)
    code, shown = run(monkeypatch, capsys, *TINY, "--gpus", "8", "--gpu-memory", memory)
    said, settings = shown.out.splitlines()[-1].split(" with: ")
    assert code == 1 and said.startswith("does not fit ")
    assert estimate(load_config(TINY[0], [*TINY[1:], *settings.split()]), 8).total < float(memory) * GIB
    code, shown = run(monkeypatch, capsys, *TINY, "--gpu-memory", "1", "data.anchor_px=1048576")
    assert code == 1 and "with any settings" in shown.out


def test_command_makes_the_table_of_the_docs(monkeypatch, capsys):
    path = ROOT / "configs" / "tiny_stage2.yaml"
    code, shown = run(monkeypatch, capsys, str(path), "--table")
    lines = shown.out.splitlines()
    assert code == 0 and lines[0] == "| GPUs | ZeRO 1 | ZeRO 2 | ZeRO 3 |"
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16", "32", "64"]
    for stage, cell in zip((1, 2, 3), rows[3][1:]):
        total = estimate(load_config(path, [f"sharding.zero_stage={stage}"]), 8).total
        assert float(cell) == pytest.approx(total / GIB, abs=0.05)


def test_the_table_of_the_docs_is_the_planners():
    """One row of each table, for 8 GPUs with ZeRO 2."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 8 |")]
    blocks = "sharding.checkpoint_blocks=[double,single]"
    settings = [("stage1", []), ("stage2", []), ("stage2", [blocks])]
    assert len(rows) == len(settings)
    for row, (stage, overrides) in zip(rows, settings):
        config = load_config(ROOT / "configs" / f"{stage}_512.yaml", ["model.path=published", *overrides])
        assert float(row[2]) == pytest.approx(estimate(config, 8).total / GIB, abs=0.051), stage


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("nowhere.yaml",), "nowhere.yaml: no such config file"),
        ((*STAGE2, "sharding.zero_stages=3"), "sharding.zero_stages: unknown key; did you mean zero_stage?"),
        ((*STAGE2, "--gpus", "0"), "--gpus"),
    ],
)
def test_mistakes_of_the_user(monkeypatch, capsys, arguments, said):
    code, shown = run(monkeypatch, capsys, *arguments)
    assert code == 2 and shown.out == ""
    assert said in shown.err and shown.err.count("\n") == 1
