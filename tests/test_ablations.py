"""Ablations: equal budgets, shared runs, sizes of regions, one from end to end on the model tiny, and their page."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uniworld import cli, cli_ablate
from uniworld.checkpoint.tiny import PACKAGED, random_tiny_dir
from uniworld.data.scenes import make
from uniworld.data.scenes.tasks import make_item
from uniworld.eval import scenes_regions
from uniworld.eval.scenes_score import Verdict
from uniworld.eval.scenes_table import Row, overall
from uniworld.train.ablations import (
    ABLATIONS,
    NUM_QUERIES,
    RUNS,
    Budget,
    chain,
    config_of,
    num_steps,
    runs_of,
)
from uniworld.train.stages import inserts_siglip, patterns_of

BENCH = Path(__file__).resolve().parent.parent / "bench"
BUDGET = Budget(start="tiny", data="data", steps=101, seed=7)


def configs():
    return {name: config_of(name, BUDGET, f"runs/{name}", "base") for name in RUNS}


def test_every_variant_takes_the_same_steps_and_samples():
    for ablation in ABLATIONS.values():
        for variant in ablation.variants:
            assert sum(num_steps(run, BUDGET) for run in chain(variant.run)) == 101, variant
    found = configs()
    assert len({config.data.batch_size for config in found.values()}) == 1
    assert {config.seed for config in found.values()} == {7}
    assert set(runs_of([v for a in ABLATIONS.values() for v in a.variants])) == set(RUNS)


def test_a_run_differs_from_the_model_as_published_in_one_thing():
    found = configs()
    full = found["stage2"]
    assert full.stage.preset == "stage2" and full.data.region_weight == "log" and inserts_siglip(full.stage)
    wanted = {
        "stage2-no-siglip": replace(full, stage=replace(full.stage, use_siglip=False)),
        "stage2-vae": replace(full, model=replace(full.model, references="vae")),
        "stage2-queries": replace(full, model=replace(full.model, num_queries=NUM_QUERIES)),
        **{
            f"stage2-{kind}": replace(full, data=replace(full.data, region_weight=kind))
            for kind in ("none", "linear", "exp", "sqrt")
        },
    }
    for name, config in wanted.items():
        assert found[name] == replace(config, run_dir=f"runs/{name}"), name
    alone = replace(found["stage1"], run_dir="runs/stage1-alone", num_steps=101)
    assert found["stage1-alone"] == alone and not inserts_siglip(alone.stage)
    assert chain("stage2-queries") == ["stage1-queries", "stage2-queries"]
    assert all(chain(name)[0] == "stage1" for name in wanted if name != "stage2-queries")
    assert "queries.*" in patterns_of(found["stage1-queries"]) and "queries.*" in patterns_of(found["stage2-queries"])
    assert "vae_projector.*" in patterns_of(found["stage2-vae"])
    assert "siglip_projector.*" not in patterns_of(found["stage2-vae"])


def test_overrides_change_all_runs_but_not_what_is_asked():
    budget = replace(BUDGET, overrides=("data.batch_size=3", "optim.betas=[0.8, 0.9]"))
    for name in RUNS:
        config = config_of(name, budget, "run", "base")
        assert config.data.batch_size == 3 and config.optim.betas == (0.8, 0.9)
    for override in ("num_steps=4", "stage.preset=lora", "model.path=x", "data.region_weight=none"):
        with pytest.raises(ValueError, match=f"override '{override}': is what the ablation itself sets"):
            replace(BUDGET, overrides=(override,))
    with pytest.raises(ValueError, match="steps=1: must be at least 2"):
        replace(BUDGET, steps=1)


def test_some_of_the_variants():
    from uniworld.cli_ablate import variants_of

    assert variants_of("region", None) == list(ABLATIONS["region"].variants)
    assert [variant.title for variant in variants_of("region", "stage2-none,stage2")] == ["logarithmic", "uniform"]


# Regions


def verdict(score, changed, stayed, inside_db=20.0):
    measures = {"changed": changed, "stayed": stayed, "inside_db": inside_db}
    return Verdict(column="edit add", index=0, score=score, right=bool(score), measures=measures)


def test_edits_by_the_size_of_their_region():
    edits = [
        verdict(1.0, 1.0, 1.0, inside_db=24.0),
        verdict(0.0, 1.0, 0.0),
        verdict(0.0, 0.0, 1.0),
        verdict(1.0, 1.0, 1.0),
    ]
    small, _, large, whole = scenes_regions.regions(edits, [0.01, 0.03, 0.2, 1.0])
    assert (small.low, small.high, small.num) == (0.0, 0.03, 2)
    assert (small.success, small.changed, small.stayed, small.inside_db) == (0.5, 1.0, 0.5, 22.0)
    assert (large.num, large.success, large.stayed) == (1, 0.0, 1.0)
    assert (whole.num, whole.success) == (1, 1.0)
    empty = scenes_regions.regions(edits[:1], [0.01])[2]
    assert (empty.num, empty.success, empty.inside_db) == (0, None, None)


def test_the_edited_share_is_that_of_pixels_that_differ():
    item = make_item("edit", 3, kind="remove")
    before, after = item.pictures
    differing = sum(
        tuple(before[y, x]) != tuple(after[y, x]) for y in range(before.shape[0]) for x in range(before.shape[1])
    )
    assert scenes_regions.edited_share(item) == pytest.approx(differing / before.shape[0] / before.shape[1])
    assert 0 < differing < before.shape[0] * before.shape[1]


def test_regions_are_those_of_the_items_judged(monkeypatch):
    """Verdicts of other columns do not count, and each edit is drawn again from its own column and number."""
    asked, shares = [], {("add", 1): 0.02, ("remove", 0): 0.25}

    def item_of(column, seed, index, size_px):
        asked.append((column.kind, index, seed, size_px))
        share = shares[column.kind, index]
        after = np.zeros((100, 100, 3), np.uint8)
        after[: round(100 * share)] = 1
        return replace(make_item("edit", 3), pictures=(np.zeros_like(after), after))

    monkeypatch.setattr(scenes_regions, "item_of", item_of)
    verdicts = [
        Verdict(column="t2i colors", index=0, score=1.0, right=True),
        replace(verdict(1.0, 1.0, 1.0), index=1),
        replace(verdict(0.0, 0.0, 1.0), column="edit remove"),
    ]
    found = scenes_regions.by_region(verdicts, 5, 64)
    assert asked == [("add", 1, 5, 64), ("remove", 0, 5, 64)]
    assert [(region.num, region.success) for region in found] == [(1, 1.0), (0, None), (1, 0.0), (0, None)]


def test_figures_are_means_over_columns():
    rows = [
        Row(group="edit", name="add", num=2, value=0.5, measures={"changed": 1.0}),
        Row(group="edit", name="remove", num=6, value=0.1, measures={"changed": 0.2}),
        Row(group="edit", name="overall", num=8, value=0.9),
        Row(group="edit", name="outside the mask", num=8, value=25.0, unit="dB"),
    ]
    assert overall(rows, "edit") == pytest.approx(0.3)
    assert overall(rows, "edit", "changed") == pytest.approx(0.6)
    assert overall(rows, "t2i") is None and overall(rows, "edit", "iou") is None


# The command


@pytest.fixture
def ablate(monkeypatch, capsys):
    """Runs the command in this process (trainings are processes of their own); gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["uniworld", "ablate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    for name, value in {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    return run


SMALL = ("data.batch_size=2", "data.anchor_px=4096", "data.vlm_max_px=3136", "data.num_workers=0", "--quiet")
SMALL += ("--steps", "2", "--num", "1", "--draw-steps", "1", "--columns", "edit add", "--workers", "1")


@pytest.mark.slow
def test_one_from_end_to_end(ablate, tmp_path):
    """Two runs, two exports, two scores; the same command again has nothing to do."""
    pytest.importorskip("deepspeed")
    folder, start = tmp_path / "out", random_tiny_dir()
    command = ("ema", *SMALL, "--start", start, "-o", folder)
    code, out, err = ablate(*command)
    assert code == 0, err
    assert "averaged weights" in out and "last weights" in out
    assert f"the weights of {start} are random" in err
    result = json.loads((folder / "ema.json").read_text())
    assert result["command"].startswith("uniworld ablate ema data.batch_size=2") and result["random_start"]
    assert (result["steps"], result["batch_size"], result["num"]) == (2, 2, 1)
    runs = [{"run": "stage1", "steps": 1}, {"run": "stage2", "steps": 1}]
    assert [variant["runs"] for variant in result["variants"]] == [runs, runs]
    for variant in result["variants"]:
        assert variant["figures"]["edit"] in (0.0, 1.0) and variant["figures"]["t2i"] is None
        assert sum(region["num"] for region in variant["regions"]) == 1

    models = (start, folder / "models" / "stage2", folder / "models" / "stage2-raw")
    base, averaged, last = (load_file(model / "model.safetensors") for model in models)
    connector = "denoise_tower.denoise_projector.0.weight"
    assert not torch.equal(base[connector], averaged[connector])  # from stage 1: its averaged weights
    assert base.keys() == averaged.keys() == last.keys()
    trained = json.loads((folder / "models" / "stage2" / "config.json").read_text())["uniworld"]
    stage1 = json.loads((folder / "models" / "stage1" / "config.json").read_text())["uniworld"]
    assert "references" not in trained and stage1["references"] == "none"

    def written():
        files = (p for part in ("runs", "models", "scores") for p in (folder / part).rglob("*") if p.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    kept = written()
    assert ablate(*command)[0] == 0
    assert written() == kept
    assert json.loads((folder / "ema.json").read_text())["variants"] == result["variants"]
    code, _, err = ablate(*command, "--seed", "1")
    assert code == 2 and "holds runs of seed=0, not 1; take another" in err


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(ABLATIONS) - {"ema"}))
def test_all_presets_work(ablate, tmp_path, name):
    pytest.importorskip("deepspeed")
    code, _, err = ablate(name, *SMALL, "-o", tmp_path / "out")
    assert code == 0, err
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert [v["title"] for v in result["variants"]] == [v.title for v in ABLATIONS[name].variants]


def test_list_and_mistakes(ablate, tmp_path):
    code, out, _ = ablate("--list")
    assert code == 0 and all(name in out for name in ABLATIONS)
    assert not any(tmp_path.iterdir())
    for arguments, message in (
        ((), "NAME: is missing"),
        (("sigli",), "NAME=sigli: must be one of stage1, no-siglip"),
        (("ema", "--columns", "routing"), "--columns routing: must be of t2i, edit and perceive"),
        (("ema", "data.bach_size=3"), "data.bach_size: unknown key; did you mean batch_size?"),
        (("ema", "--data", "nowhere"), "--data nowhere: no such file or folder"),
        (
            ("region", "--only", "stage2,stage2-ex"),
            "--only stage2,stage2-ex: 'stage2-ex' is not one of stage2, stage2-n",
        ),
        (("region", "--only", "stage2"), "--only stage2: must name two variants or more"),
    ):
        code, _, err = ablate(*arguments, "-o", tmp_path / "out")
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").touch()
    code, _, err = ablate("ema", *SMALL, "-o", tmp_path)
    assert code == 2 and f"{tmp_path}: is neither empty nor a folder of ablations" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_data_of_make_data_are_found(tmp_path):
    from uniworld.cli_ablate import training_source

    plan = make.DataPlan(num=2, tasks=("edit",), format="both")
    make.make_data(plan, tmp_path / "scenes")
    assert training_source(tmp_path / "scenes") == str(tmp_path / "scenes" / "data.txt")
    (tmp_path / "scenes" / "data.txt").unlink()
    assert training_source(tmp_path / "scenes") == str(tmp_path / "scenes" / "shards")
    assert training_source(tmp_path / "scenes" / "shards") == str(tmp_path / "scenes" / "shards")
    assert training_source(Path("shard-{000..031}.tar")) == "shard-{000..031}.tar"


def test_a_signal_reaches_the_training(monkeypatch):
    """The training saves and ends with 143, and so does the command."""
    from uniworld.train import command

    handled = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    popen, before = subprocess.Popen, signal.getsignal(signal.SIGTERM)
    for handles in (handled, ""):  # the second is not as far yet, and dies of the signal
        child = f"import os, signal, sys, time\n{handles}os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
        monkeypatch.setattr(command.subprocess, "Popen", lambda _, child=child: popen([sys.executable, "-c", child]))
        assert command.run_command("train", "config.yaml") == 143
        assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(command.subprocess, "Popen", lambda _: popen([sys.executable, "-c", "raise SystemExit(2)"]))
    assert command.run_command("train", "config.yaml") == 2


# The page


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import ablations

    return ablations


def a_result(name, success):
    region = {"low": 0.0, "high": 0.04, "num": 9, "success": success, "changed": 1.0, "stayed": 1.0, "inside_db": 9.5}
    figures = {"t2i": 0.125, "edit": success, "changed": 0.75, "stayed": 0.5, "psnr_db": 21.26, "inside_db": 12.34}
    figures |= {"perceive": None}
    variants = [{"title": v.title, "figures": figures, "regions": [region]} for v in ABLATIONS[name].variants]
    return {
        "ablation": name, "variants": variants, "steps": 2000, "batch_size": 16, "num": 50, "seed": 3,
        "device": "a machine", "dtype": "fp32", "date": "2026-01-02T03:04:05+00:00", "random_start": False,
        "command": f"uniworld ablate {name} --steps 2000", "versions": {"uniworld": "1.0"},
    }  # fmt: skip


def test_the_page_agrees_with_the_results(pages):
    page = pages.PAGE.read_text(encoding="utf-8")
    assert pages.render(page, pages.read_results()) == page, "run python bench/ablations.py"
    empty = pages.render(page, [])
    assert empty.count(pages.NOT_RUN) == empty.count("<!-- table: ") == len(ABLATIONS)
    assert all(f"<!-- table: {name} -->" in page for name in ABLATIONS)


def test_results_become_tables(pages, tmp_path):
    for name in ("region", "ema"):
        (tmp_path / f"{name}-here.json").write_text(json.dumps(a_result(name, 0.5)))
    page = pages.render(pages.PAGE.read_text(encoding="utf-8"), pages.read_results(tmp_path))
    assert page.count(pages.NOT_RUN) == len(ABLATIONS) - 2
    assert "| uniform | 12.5 % | 50.0 % | 75.0 % | 50.0 % | 21.3 | 12.3 | - |" in page
    assert "| last weights | 12.5 % | 50.0 % |" in page
    assert page.count("| edits that succeed, and inside, by edited share | 0% to 4% (9 edits) |") == 1
    assert "| uniform | 50.0 %, 9.5 dB |" in page
    assert "2,000 steps of 16 samples a variant, 50 held-out items a column. Seed 3." in page
    assert "a machine, fp32, 2026-01-02, version 1.0." in page
    assert "```bash\nuniworld ablate region --steps 2000\n```" in page


def test_pictures_are_drawn_as_the_start_says_unless_asked_otherwise():
    own = json.loads((PACKAGED / "config.json").read_text())["uniworld"]
    given = {"start": "tiny", "data": None, "steps": 2, "num": 1, "columns": "edit", "only": None, "seed": 0}
    given |= {"workers": None, "overrides": (), "quiet": True}
    found = cli_ablate.with_own_drawing(cli_ablate.AblateOptions(**given, draw_steps=None, guidance=7.0))
    assert (found.draw_steps, found.guidance) == (own["num_inference_steps"], 7.0) and own["num_inference_steps"] != 28
    found = cli_ablate.with_own_drawing(cli_ablate.AblateOptions(**given, draw_steps=9, guidance=None))
    assert (found.draw_steps, found.guidance) == (9, own["guidance_scale"]) and own["guidance_scale"] != 3.5
    assert "--draw-steps 9 --guidance 1.0 --seed 0" in cli_ablate.command("ema", found)
