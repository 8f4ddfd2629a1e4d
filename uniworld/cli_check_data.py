"""What `check-data` does: look at all samples, print a table, write a page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uniworld.checkpoint.progress import count_progress
from uniworld.config import DataConfig, SourceConfig, from_dict, load_config
from uniworld.data.check import SourceReport, check
from uniworld.data.dataset import Dataset

NUM_ERRORS_PRINTED = 10  # a source
EXIT_BAD_DATA = 1
HEADER = ("source", "samples", "checked", "0/1/2+ references", "edited", "no region", "errors")
CAPTION = "edited: median share of the latents; no region: pairs in which no edit was found"


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What to look at, and where to write the page."""

    kind: str
    columns: tuple[str, ...]
    anchor_px: int | None
    limit: int | None
    page: Path | None
    num_shown: int


def check_data(sources: Sequence[str], options: CheckOptions, workers: int | None, quiet: bool) -> int:
    """Check, print and write; returns the exit code."""
    config = data_config(sources, options)
    if options.page is not None:
        _check_page(options.page)
    if os.environ.get("UNIWORLD_DEBUG") != "1":
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    dataset = Dataset(config.sources)
    num_workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    with count_progress("Checking", not quiet) as progress:
        reports = check(
            dataset, config, limit=options.limit, num_workers=num_workers if num_workers > 1 else 0, progress=progress
        )
    rows = [_row(report) for report in reports]
    print_reports(reports, rows)
    if options.page is not None:
        from uniworld.data.check_page import render

        text = render(reports, dataset, config, HEADER, rows, options.num_shown)
        try:
            options.page.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--page {options.page}: cannot be written ({error})") from error
        print(options.page, flush=True)
    return EXIT_BAD_DATA if any(report.num_errors for report in reports) else 0


def data_config(sources: Sequence[str], options: CheckOptions) -> DataConfig:
    """The settings of one YAML file, or the defaults with these sources."""
    if any(source.endswith((".yaml", ".yml")) for source in sources):
        if len(sources) > 1:
            raise ValueError("SOURCE: a YAML file stands alone")
        for name, given in (("--kind", options.kind != "auto"), ("--column", bool(options.columns))):
            if given:
                raise ValueError(f"{name}: the config says it, leave it out here")
        config = load_config(sources[0]).data
        if not config.sources:
            raise ValueError(f"{sources[0]}: data.sources is empty")
    else:
        entries = [
            from_dict(SourceConfig, {"path": path, "kind": options.kind, "columns": options.columns})
            for path in sources
        ]
        config = DataConfig(sources=tuple(entries))
    return config if options.anchor_px is None else replace(config, anchor_px=options.anchor_px)


def _check_page(page: Path) -> None:
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--page {page}: must end in .html")
    if not page.parent.is_dir():
        raise ValueError(f"--page {page}: the directory {page.parent} does not exist")
    if page.is_dir() or (page.exists() and not os.access(page, os.W_OK)):
        raise ValueError(f"--page {page}: cannot be written")


def _row(report: SourceReport) -> tuple[str, ...]:
    references = report.references
    share = report.median_edited_share
    return (
        report.name,
        str(report.num_samples),
        str(report.num_checked),
        f"{references[0]}/{references[1]}/{references.total() - references[0] - references[1]}",
        "-" if share is None else f"{share:.0%}",
        str(report.num_unchanged),
        str(report.num_errors),
    )


def print_reports(reports: Sequence[SourceReport], rows: Sequence[Sequence[str]]) -> None:
    """The table, then the first errors of each source."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE, caption=CAPTION)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_printable(cell)) for cell in row), style="red" if row[-1] != "0" else None)
    console.print(table)
    for report in reports:
        for bad in report.errors[:NUM_ERRORS_PRINTED]:
            print(bad)
        if report.num_errors > NUM_ERRORS_PRINTED:
            print(f"{_printable(report.name)}: and {report.num_errors - NUM_ERRORS_PRINTED} more")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
