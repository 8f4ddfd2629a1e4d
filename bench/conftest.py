"""Options and fixtures of the benchmarks: `pytest bench/ --rows DIR`."""

import os
from pathlib import Path

import pytest
import rows
import torch
from timing import CLOCK, Samples

KIND = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption("--rows", metavar="DIR", help=f"append every measurement to DIR (or ${rows.ROWS_VARIABLE})")


def pytest_collection_modifyitems(items):
    """Measuring takes as long as it takes, by one clock: the one that replays interleaved samples."""
    for item in items:
        item.add_marker(pytest.mark.timeout(0))
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False))


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_code = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Where a bench has trained, leave as the trainer does: the threads of its process group may abort else."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from uniworld.train.sharding import exit_process

        exit_process(config.exit_code)


def rows_folder(config) -> Path | None:
    chosen = config.getoption("--rows") or os.environ.get(rows.ROWS_VARIABLE)
    return Path(chosen) if chosen else None


@pytest.fixture
def report_count(request):
    """`report_count(bench, case, side, dtype, **figures)`: keep counted figures as a row; no clock, and no device."""

    def keep(bench: str, case: str, side: str, dtype: torch.dtype, **figures) -> None:
        row = {"bench": bench, "case": case, "side": side, "dtype": str(dtype).removeprefix("torch."), **figures}
        rows.write(rows_folder(request.config), row | rows.stamp("counted"))

    return keep


@pytest.fixture
def report_missing(request):
    """`report_missing(bench, case, side, dtype, why)`: a row that says why a side was not measured here."""

    def keep(bench: str, case: str, side: str, dtype: torch.dtype, why: str) -> None:
        row = {"bench": bench, "case": case, "side": side, "dtype": str(dtype).removeprefix("torch.")}
        rows.write(rows_folder(request.config), row | {"missing": why} | rows.stamp(KIND))

    return keep


@pytest.fixture
def written(request):
    """`written(bench, case, dtype)`: the sides of a case whose rows, of this commit and device, are there already."""

    def sides(bench: str, case: str, dtype: torch.dtype) -> set[str]:
        return rows.sides_written(rows_folder(request.config), bench, case, str(dtype).removeprefix("torch."), KIND)

    return sides


@pytest.fixture
def report(request, benchmark):
    """`report(bench, case, side, dtype, samples, **more)`: show a measurement, and keep it as a row where asked.

    `kind="cpu"` says that a bench runs on the CPU even where there is a GPU.
    """
    folder = rows_folder(request.config)

    def keep(bench: str, case: str, side: str, dtype: torch.dtype, samples: Samples, kind: str = KIND, **more) -> None:
        row = {"bench": bench, "case": case, "side": side, "dtype": str(dtype).removeprefix("torch.")}
        row |= {**samples.as_row(), **more, **rows.stamp(kind)}
        rows.write(folder, row)
        benchmark.group = f"{bench} {case} {row['dtype']}"
        benchmark.extra_info.update(row)
        CLOCK.show(benchmark, samples)

    return keep
