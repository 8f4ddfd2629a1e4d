"""The command `make-data`. What draws and writes is imported inside it, so that `--help` is immediate."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer


def make_data(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to fill.")],
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Pairs in all.")] = 100_000,
    split: Annotated[str, typer.Option(help="train or held-out.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Of understanding, t2i, edit, perceive, compose, keep; default: all."),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(metavar="KIND,...", help='Of these tasks, such as "counting,position"; default: all.'),
    ] = None,
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Width and height of the pictures.")] = 128,
    format: Annotated[str, typer.Option(help="webdataset (tar shards), authors (data.txt) or both.")] = "both",
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes; default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make training data of drawn scenes: pictures, instructions, questions and answers.

    The same command goes on where it was interrupted.

    Example: `uniworld make-data --num 100000 -o scenes`

    Example: `uniworld make-data --num 2000 -o check --split held-out --tasks edit,t2i`
    """
    from uniworld.checkpoint.progress import count_progress
    from uniworld.data.scenes import make
    from uniworld.data.scenes.tasks import MIXTURE

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is no folder")
    plan = make.DataPlan(
        num=num,
        split=split,
        seed=seed,
        tasks=_names(tasks, tuple(MIXTURE)),
        kinds=_names(kinds, ()),
        size_px=size,
        format=format,
    )
    make.open_folder(plan, output)  # before the bar is drawn
    start = time.perf_counter()
    with count_progress("Making data", not quiet, unit="pairs") as progress:
        made = make.make_data(plan, output, num_workers=workers or os.cpu_count() or 1, progress=progress)
    if not quiet:
        _report(made, num, time.perf_counter() - start)
    for path in make.results(plan, output):
        print(path)


def _names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(name.strip() for name in text.split(","))


def _report(made: int, num: int, seconds: float) -> None:
    from rich.console import Console

    there = f", {num - made} were there" if made < num else ""
    text = f"{made} pairs in {seconds:.1f} s ({made / max(seconds, 1e-9):.0f} pairs/s){there}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)
