"""What `eval scenes` does: have the model answer, judge, print the table, write JSON and the page."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.load import drawing_defaults, model_folder
from uniworld.cli_draw import load_engine, note_random_weights, plain_warnings, stderr_console
from uniworld.cli_options import LoadOptions, ReportOptions
from uniworld.data.scenes.make import write_whole
from uniworld.data.scenes.render import check_size
from uniworld.eval import scenes_page
from uniworld.eval.scenes_columns import Column, chosen
from uniworld.eval.scenes_score import judge_all
from uniworld.eval.scenes_suite import SuitePlan, answer_all, answer_path, open_folder
from uniworld.eval.scenes_table import FULL_NUM, GOAL, TITLES, Row, as_json, rows_of

RESULTS = "scores.json"
NOISE_NOTE = "note: the weights of model {model!r} are random, nothing was trained: the scores are those of noise"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to score, and how."""

    num: int
    columns: str | None
    steps: int | None
    guidance: float | None
    seed: int
    size_px: int
    batch: int
    workers: int | None
    page: Path | None
    num_shown: int


def scenes(folder: Path, options: EvalOptions, load: LoadOptions, report: ReportOptions) -> None:
    """Answer what is not answered yet, judge everything, print and write."""
    load.refuse_sequence_parallel()
    columns = chosen(options.columns)
    check_size(options.size_px)
    if options.page is not None and options.page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--page {options.page}: must end in .html")
    model = " + ".join([load.model, *(load.lora or ())])
    own = model_folder(load.model)
    defaults = drawing_defaults(read_config(own), own)
    plan = SuitePlan(
        model=model,
        seed=options.seed,
        steps=options.steps or defaults["num_inference_steps"],
        edit_steps=options.steps or defaults["edit_inference_steps"],
        guidance=defaults["guidance_scale"] if options.guidance is None else options.guidance,
        size_px=options.size_px,
    )
    open_folder(plan, folder)
    _answer(plan, columns, options, folder, load, report)
    workers = options.workers or os.cpu_count() or 1
    with progress_bar(report.quiet) as progress:
        verdicts = judge_all(
            columns, options.num, plan.seed, plan.size_px, folder, num_workers=workers, progress=progress
        )
    rows = rows_of(verdicts)
    print_rows(rows)
    _write(folder / RESULTS, json.dumps(as_json(asdict(plan), rows, verdicts), indent=2, ensure_ascii=False))
    print(folder / RESULTS, flush=True)
    if options.page is not None:
        _write(options.page, scenes_page.render(plan, rows, verdicts, folder, options.num_shown))
        print(options.page, flush=True)


def _answer(
    plan: SuitePlan, columns: Sequence[Column], options: EvalOptions, folder: Path, load: LoadOptions,
    report: ReportOptions,
) -> None:  # fmt: skip
    """Load the model only where an answer is missing."""
    if all(answer_path(folder, column, i).exists() for column in columns for i in range(options.num)):
        return
    with plain_warnings(stderr_console(report)):
        engine, _ = load_engine(load, None, report)
        note_random_weights(engine, NOISE_NOTE)
        engine.scheduler.max_batch_size = options.batch
        with progress_bar(report.quiet) as progress:
            answer_all(engine, plan, columns, options.num, folder, progress)


def print_rows(rows: Sequence[Row]) -> None:
    """The table on stdout."""
    table = Table("", "", "items", "score", "floor", "", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:6]:
        column.no_wrap = True
    for column in table.columns[2:5]:
        column.justify = "right"
    last = None
    for row in rows:
        if row.group != last and last is not None:
            table.add_section()
        mark = {None: "", True: "[green]met[/]", False: "[red]not met[/]"}[row.met]
        measures = "" if row.unit != "%" else ", ".join(_told(item) for item in list(row.measures.items()))
        title = TITLES[row.group] if row.group != last else ""
        table.add_row(title, row.name, str(row.num), row.told(), row.floor_told(), mark, measures)
        last = row.group
    console = Console(highlight=False)
    console.print(table)
    if any(row.num < FULL_NUM for row in rows):
        console.print(f"floors are meant for at least {FULL_NUM} items a column; the goal is {GOAL:.0%} in every one")


def _told(measure: tuple[str, float]) -> str:
    name, value = measure
    return f"{name.removesuffix('_db')} {value:.1f} dB" if name.endswith("_db") else f"{name} {value:.3g}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function that is told (what, done, total), which draws a bar on stderr."""
    if quiet:
        yield None
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars: dict[str, int] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield update
