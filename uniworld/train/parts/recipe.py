"""The whole training of `tiny`, step by step. Each step goes on where it stopped, so all of it does."""

import glob
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uniworld.checkpoint.connector_files import EXPORTS
from uniworld.checkpoint.locate import read_json
from uniworld.checkpoint.save import atomic_folder
from uniworld.config import load_config
from uniworld.data.scenes.make import DataPlan, write_whole
from uniworld.train.command import run_command
from uniworld.train.export import export
from uniworld.train.parts.start import write_start
from uniworld.train.parts.wider import widened
from uniworld.train.parts.words import IDS
from uniworld.train.signals import EXIT_STOPPED, StopSignals

TRAINED_PARTS = ("vae", "vlm", "semantic_encoder", "base", "redux", "align", "task_head")
DRAWN_TASKS = "t2i,edit,perceive,compose,keep"  # what stages 1 and 2 learn: all that ends with a picture
WORDS = "words"  # folder of the tokenizers
DONE = "steps.json"
MAX_FILE_BYTES = 15_000_000  # small enough for a repository


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of this package, or a function."""

    name: str
    command: tuple[str, ...] = ()
    function: Callable[[], object] | None = None


def recipe(
    root: Path, configs: Path, num_items: int, wider: int = 1, stage_dtype: str | None = None
) -> tuple[Step, ...]:
    """The steps in order; all that they make lies in `root`.

    Args:
        configs: folder with `vae.yaml` and the others, one a training.
        num_items: of the data set of stages 1 and 2.
        wider: how many times a training's batch to take, in so many times fewer steps.
        stage_dtype: of stages 1 and 2 and the states they learn from, in the place of their configs'.
    """
    start, data, states, connectors = root / "start", root / "data", root / "states", root / "stage1" / "connectors"

    def config(name: str) -> tuple[str, ...]:
        path = configs / f"{name}.yaml"
        return str(path), f"run_dir={root / name}", *widened(path, wider)

    model, sources = f"model.path={start}", sources_in(data / "shards", configs / "stage2.yaml", num_items)
    dtype = () if stage_dtype is None else (f"sharding.dtype={stage_dtype}",)
    common = model, f"data.precomputed={states}", "data.sources=[]", *dtype
    encode = "precompute", str(configs / "stage2.yaml"), model, sources, *dtype, "-o", str(states)
    parts = [
        Step(name=part, command=("train-part", *config(part), f"parts={root}", f"words={root / WORDS}"))
        for part in TRAINED_PARTS
    ]
    make = ("make-data", "-o", str(data), "--num", str(num_items), "--tasks", DRAWN_TASKS, "--format", "webdataset")
    taken = ("--ema", "--overwrite", "-o")
    return (
        *parts,
        Step(name="start", function=lambda: write_start(root, start)),
        Step(name="data", command=make),
        Step(name="states", command=encode),
        Step(name="stage1", command=("train", *config("stage1"), *common)),
        Step(name="connectors", command=("export", str(root / "stage1"), "--connectors-only", *taken, str(connectors))),
        Step(name="stage2", command=("train", *config("stage2"), *common, f"model.connectors={connectors}")),
        Step(name="model", function=lambda: write_model(root)),
    )


def sources_in(shards: Path, config: Path, num_items: int) -> str:
    """The sources of a config, each a glob of the shards of one task, in another folder; those that have items."""
    made = DataPlan(num=num_items, tasks=tuple(DRAWN_TASKS.split(","))).counts
    listed = []
    for source in load_config(config).data.sources:
        name = Path(source.path).name
        if made[name.partition("-")[0]]:
            listed.append({"path": f"{glob.escape(str(shards))}/{name}", "weight": source.weight})
    return f"data.sources={json.dumps(listed)}"


def take_finished(root: Path, finished: Path) -> list[str]:
    """Copy tokenizers and parts that are in `finished` and not yet in `root`; returns the steps that they save.

    Raises: ValueError where `root` has tokenizers of its own: parts that learned other words do not go together.
    """
    words = root / WORDS
    if words.is_dir() and (words / IDS).read_bytes() != (finished / WORDS / IDS).read_bytes():
        raise ValueError(f"finished={finished}: its parts learned other words than {words}; take another output folder")
    names = [name for name in TRAINED_PARTS if (finished / name / "model").is_dir() and not (root / name).exists()]
    for name in (*([] if words.is_dir() else [WORDS]), *names):
        with atomic_folder(root / name, keep_existing=True) as temporary:
            shutil.copytree(finished / name, temporary, dirs_exist_ok=True)
    return names


def write_model(root: Path) -> None:
    """The averaged weights of stage 2 as a complete model, in files of at most MAX_FILE_BYTES; without the copies of
    the connectors that `export` puts beside the model they are in."""
    model = root / "model"
    export(root / "stage2", model, ema=True, overwrite=True, max_shard_bytes=MAX_FILE_BYTES)
    for path in (model / f"{part}{suffix}" for part in EXPORTS for suffix in (".bin", ".safetensors")):
        path.unlink(missing_ok=True)


class Recipe:
    """Runs steps and remembers in `root`/steps.json which are done.

    Args:
        note: called with a line before each step.
    """

    def __init__(self, root: Path, steps: tuple[Step, ...], note: Callable[[str], None] = lambda _: None):
        self.root, self.steps, self.note = root, steps, note

    @property
    def done(self) -> list[str]:
        path = self.root / DONE
        return read_json(path)["done"] if path.is_file() else []

    def count_as_done(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.done:
                self._mark(name)

    def run(self, seconds: float | None = None) -> int:
        """All steps that are not done, for at most `seconds`; 0 where nothing is left, 143 where it was stopped.

        Raises: ValueError naming the step that failed.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with StopSignals() as signals:
            for number, step in enumerate(self.steps, 1):
                if step.name in self.done:
                    continue
                if signals.received or (end is not None and time.monotonic() >= end):
                    return EXIT_STOPPED
                self.note(f"[{number}/{len(self.steps)}] {step.name}: {' '.join(step.command) or 'in this process'}")
                if not self._run(step, end, signals):
                    return EXIT_STOPPED
                self._mark(step.name)
        return 0

    def _run(self, step: Step, end: float | None, signals: StopSignals) -> bool:
        """Whether the step came to its end."""
        if step.function is not None:
            step.function()
            return True
        seconds = None if end is None else max(0.0, end - time.monotonic())
        code = run_command(*step.command, seconds=seconds, outer=signals)
        if code not in (0, EXIT_STOPPED):
            raise ValueError(f"{step.name}: failed with exit code {code}; the same command tries it again")
        return code == 0

    def _mark(self, name: str) -> None:
        path = self.root / DONE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"done": [*self.done, name]}, indent=1) + "\n")
