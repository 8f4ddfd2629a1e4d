"""What `ablate` does: draw data, train, export and score what is not there yet, then print and write a table.

DIR/ablation.json        what all runs have in common
DIR/data/                drawn training data, where none was given
DIR/runs/RUN/            trainings, with RUN.yaml beside them; DIR/models/ what was exported of them
DIR/scores/VARIANT/      answers and scores.json
DIR/NAME.json            the result of an ablation
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from uniworld import environment
from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.load import drawing_defaults, model_folder
from uniworld.checkpoint.locate import read_json
from uniworld.checkpoint.progress import count_progress
from uniworld.cli_ablate_tables import print_result
from uniworld.cli_draw import silence_libraries
from uniworld.cli_eval import progress_bar
from uniworld.config import TrainConfig, to_yaml
from uniworld.data.scenes import make
from uniworld.data.scenes.make import write_whole
from uniworld.eval.scenes_columns import Column, chosen
from uniworld.eval.scenes_regions import by_region
from uniworld.eval.scenes_score import judge_all
from uniworld.eval.scenes_suite import SuitePlan, answer_all, answer_path, open_folder
from uniworld.eval.scenes_table import as_json, overall, rows_of
from uniworld.train.ablations import (
    ABLATIONS,
    SIZE_PX,
    Budget,
    Variant,
    chain,
    config_of,
    num_steps,
    runs_of,
)
from uniworld.train.checkpoints import checkpoints_dir, complete_checkpoints
from uniworld.train.command import run_command
from uniworld.train.export import export
from uniworld.train.signals import EXIT_STOPPED
from uniworld.version import __version__

ALL = "all"
PLAN, SCORES = "ablation.json", "scores.json"
DRAWN = "drawn"  # what stands in a plan and a result for data of the folder's own
DRAWN_TASKS = ("t2i", "edit", "perceive", "compose")  # understanding trains nothing of what is ablated
DRAWN_AT_ONCE = 8
MOST_DRAWN = 20_000  # samples; a longer training sees them again


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """What to train on and from, and what to score. Where `data` is None, they are drawn; where `draw_steps` or
    `guidance` is, pictures are drawn as the start says."""

    start: str
    data: Path | None
    steps: int
    num: int
    columns: str
    only: str | None
    draw_steps: int | None
    guidance: float | None
    seed: int
    workers: int | None
    overrides: tuple[str, ...]
    quiet: bool


def ablate(name: str, folder: Path, options: AblateOptions) -> int:
    """Run one ablation or all, or go on with it; returns the exit code."""
    if name not in (*ABLATIONS, ALL):
        raise ValueError(f"NAME={name}: must be one of {', '.join(ABLATIONS)} or {ALL}; --list says what they ask")
    silence_libraries()
    columns = chosen(options.columns)
    if not all(column.draws for column in columns):
        raise ValueError(f"--columns {options.columns}: must be of t2i, edit and perceive; the VLM is the same in all")
    budget, options = budget_of(options), with_own_drawing(options)
    names = tuple(ABLATIONS) if name == ALL else (name,)
    for run in runs_of([variant for one in names for variant in variants_of(one, options.only)]):
        run_config(run, budget, folder)  # a mistake in the overrides is found before anything is written
    claim(folder, budget)
    if options.data is None:
        draw_data(budget, folder, options)
    for one in names:
        if code := answer(one, columns, budget, folder, options):
            return code
    if is_random(budget.start):
        note = f"note: the weights of {budget.start} are random: what is drawn is noise, whatever was trained"
        Console(stderr=True, highlight=False, soft_wrap=True).print(note, style="yellow", markup=False)
    return 0


def answer(name: str, columns: Sequence[Column], budget: Budget, folder: Path, options: AblateOptions) -> int:
    """Train, score and compare the variants of an ablation; returns the exit code."""
    ablation, found = ABLATIONS[name], []
    for variant in variants_of(name, options.only):
        for run in chain(variant.run):
            if code := train(run, budget, folder, options.quiet):
                return code
        found.append(describe(variant, budget, score(variant, columns, budget, folder, options)))
    result = {"ablation": name, "command": command(name, options), **conditions(budget, options), "variants": found}
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print_result(ablation, found)
    print(folder / f"{name}.json", flush=True)
    return 0


def variants_of(name: str, only: str | None) -> list[Variant]:
    """Those of an ablation, or the ones that `only` names.

    Raises: ValueError where it names one that is not there, or fewer than two.
    """
    variants = {variant.name: variant for variant in ABLATIONS[name].variants}
    if only is None:
        return list(variants.values())
    names = only.split(",")
    if wrong := [one for one in names if one not in variants]:
        raise ValueError(f"--only {only}: {wrong[0]!r} is not one of {', '.join(variants)}")
    if len(set(names)) < 2:
        raise ValueError(f"--only {only}: must name two variants or more, to be compared")
    return [variant for key, variant in variants.items() if key in names]


def with_own_drawing(options: AblateOptions) -> AblateOptions:
    """Steps and guidance of the start where none are asked for; with pictures as many steps as without."""
    folder = model_folder(options.start)
    own = drawing_defaults(read_config(folder), folder)
    return replace(
        options,
        draw_steps=own["num_inference_steps"] if options.draw_steps is None else options.draw_steps,
        guidance=own["guidance_scale"] if options.guidance is None else options.guidance,
    )


def budget_of(options: AblateOptions) -> Budget:
    """What all runs have in common; the dtype is bf16 on a GPU, fp32 without one."""
    import torch

    return Budget(
        start=options.start,
        data=DRAWN if options.data is None else training_source(options.data),
        steps=options.steps,
        seed=options.seed,
        dtype="bf16" if torch.cuda.is_available() else "fp32",
        overrides=options.overrides,
    )


def claim(folder: Path, budget: Budget) -> None:
    """Make a folder that is for one budget, or see that it is for this one.

    Raises: ValueError where the folder holds runs of another budget, or something else.
    """
    path, mine = folder / PLAN, json.loads(json.dumps(asdict(budget)))
    if path.is_file():
        there = read_json(path)
        for field, value in mine.items():
            if there.get(field) != value:
                raise ValueError(f"{folder}: holds runs of {field}={there.get(field)}, not {value}; take another")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is neither empty nor a folder of ablations")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(mine, indent=1))


def training_source(path: Path) -> str:
    """What a training reads of `path`: of a folder that `make-data` filled, its `data.txt` or its shards.

    Raises: FileNotFoundError where there is no such file or folder.
    """
    if not path.exists() and not set(str(path)) & set("{*?["):
        raise FileNotFoundError(f"--data {path}: no such file or folder")
    if (path / make.MANIFEST).is_file():
        return str(path / "data.txt" if (path / "data.txt").is_file() else path / "shards")
    return str(path)


def run_config(run: str, budget: Budget, folder: Path) -> TrainConfig:
    """The config of a run with its place in the folder."""
    *_, before, own = ["", *chain(run)]
    model = str(folder / "models" / before) if before else budget.start
    if budget.data == DRAWN:
        budget = replace(budget, data=str(folder / "data" / "shards"))
    return config_of(own, budget, str(folder / "runs" / own), model)


def draw_data(budget: Budget, folder: Path, options: AblateOptions) -> None:
    """Draw as many samples as a variant sees, up to a limit."""
    batch_size = run_config("stage1", budget, folder).data.batch_size
    num = min(MOST_DRAWN, budget.steps * batch_size)
    plan = make.DataPlan(num=num, seed=budget.seed, tasks=DRAWN_TASKS, size_px=SIZE_PX, format="webdataset")
    with count_progress("Making data", not options.quiet, unit="pairs") as progress:
        make.make_data(plan, folder / "data", num_workers=options.workers or os.cpu_count() or 1, progress=progress)


def train(run: str, budget: Budget, folder: Path, quiet: bool) -> int:
    """Train a run in a process of its own, unless it is done, and export its averaged weights.

    Returns: 0, or 143 where it was stopped by a signal and has saved.
    """
    config = run_config(run, budget, folder)
    done = complete_checkpoints(checkpoints_dir(config.run_dir))
    if not done or done[-1].step < config.num_steps:
        path = folder / "runs" / f"{run}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, to_yaml(config))
        code = run_command("train", str(path), *(["--quiet"] if quiet else []))
        if code == EXIT_STOPPED:
            return code
        if code:
            raise ValueError(f"{path}: training ended with exit code {code}; its own error is above")
    exported(Variant(title=run, run=run), folder, quiet)
    return 0


def exported(variant: Variant, folder: Path, quiet: bool) -> Path:
    """The model of a variant whose run is done."""
    model = folder / "models" / variant.name
    if not (model / "config.json").is_file():
        model.parent.mkdir(exist_ok=True)
        export(folder / "runs" / variant.run, model, ema=variant.ema, progress=not quiet)
    return model


def score(
    variant: Variant, columns: Sequence[Column], budget: Budget, folder: Path, options: AblateOptions
) -> dict[str, Any]:
    """The scores of a variant on held-out items; what was scored before is read."""
    steps, guidance = options.draw_steps, options.guidance
    plan = SuitePlan(model=variant.name, steps=steps, edit_steps=steps, guidance=guidance, size_px=SIZE_PX)
    scores = folder / "scores" / variant.name
    asked = {"num": options.num, "columns": [column.name for column in columns]}
    open_folder(plan, scores)
    if (scores / SCORES).is_file() and (there := read_json(scores / SCORES))["asked"] == asked:
        return there
    with progress_bar(options.quiet) as progress:
        if not all(answer_path(scores, column, i).exists() for column in columns for i in range(options.num)):
            engine = load(variant, budget, folder, options.quiet)
            answer_all(engine, plan, columns, options.num, scores, progress)
        workers = options.workers or os.cpu_count() or 1
        verdicts = judge_all(
            columns, options.num, plan.seed, plan.size_px, scores, num_workers=workers, progress=progress
        )
    rows = rows_of(verdicts)
    found = {
        "asked": asked,
        **as_json(asdict(plan), rows, verdicts),
        "figures": {
            "t2i": overall(rows, "t2i"),
            "edit": overall(rows, "edit"),
            "changed": overall(rows, "edit", "changed"),
            "stayed": overall(rows, "edit", "stayed"),
            "psnr_db": next((row.value for row in rows if row.group == "edit" and row.unit == "dB"), None),
            "inside_db": overall(rows, "edit", "inside_db"),
            "perceive": overall(rows, "perceive"),
        },
        "regions": [asdict(region) for region in by_region(verdicts, plan.seed, plan.size_px)],
    }
    write_whole(scores / SCORES, json.dumps(found, indent=1, ensure_ascii=False))
    return found


def load(variant: Variant, budget: Budget, folder: Path, quiet: bool) -> Any:
    """An engine that draws as the variant was trained: from the VLM's states alone, without T5's."""
    from uniworld.engine import Engine
    from uniworld.train.sharding import DTYPES

    model = exported(variant, folder, quiet)
    settings = {"dtype": DTYPES[budget.dtype], "use_t5": False, "max_batch_size": DRAWN_AT_ONCE}
    return Engine.from_pretrained(str(model), **settings, progress=not quiet)


def describe(variant: Variant, budget: Budget, scores: dict[str, Any]) -> dict[str, Any]:
    """A variant's part of the result."""
    runs = [{"run": run, "steps": num_steps(run, budget)} for run in chain(variant.run)]
    weights = "averaged" if variant.ema else "last"
    return {"title": variant.title, "runs": runs, "weights": weights} | {
        key: scores[key] for key in ("figures", "regions", "rows", "by_kind")
    }


def conditions(budget: Budget, options: AblateOptions) -> dict[str, Any]:
    """All that the variants of a result have in common."""
    import torch

    report = environment.gpu(torch.device("cuda")) if torch.cuda.is_available() else environment.cpu()
    config = config_of("stage1", budget, "", budget.start)
    return {
        "start": budget.start,
        "random_start": is_random(budget.start),
        "data": budget.data,
        "steps": budget.steps,
        "batch_size": config.data.batch_size,
        "seed": budget.seed,
        "overrides": list(budget.overrides),
        "num": options.num,
        "columns": options.columns,
        "draw_steps": options.draw_steps,
        "guidance": options.guidance,
        "dtype": config.sharding.dtype,
        "device": report["name"],
        "kind": report["type"],
        "versions": {"uniworld": __version__, "torch": torch.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_random(start: str) -> bool:
    """Whether a model says that nothing of it was trained."""
    return bool(read_json(model_folder(start) / "config.json").get("uniworld", {}).get("random_weights", False))


def command(name: str, options: AblateOptions) -> str:
    """What repeats a result elsewhere."""
    words = ["uniworld", "ablate", name, *options.overrides, "--start", options.start, "--steps", str(options.steps)]
    words += ["--num", str(options.num), "--columns", options.columns, "--draw-steps", str(options.draw_steps)]
    words += ["--guidance", str(options.guidance), "--seed", str(options.seed)]
    words += ["--only", options.only] if options.only is not None else []
    words += ["--data", str(options.data)] if options.data is not None else []
    return " ".join(f'"{word}"' if set(word) & set(" []{}*?") else word for word in words)
