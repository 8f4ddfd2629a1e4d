"""Rows: one measurement, one JSON line, with the machine, versions and commit that it was taken on.

Rows are appended to `<bench>.jsonl` in the folder given by `--rows` or `UNIWORLD_BENCH_ROWS`; committed ones live in
`bench/results`. Where two rows measure the same thing on the same device, the later line counts.
"""

import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
ROWS_VARIABLE = "UNIWORLD_BENCH_ROWS"
PACKAGES = ("torch", "triton", "transformers", "diffusers", "deepspeed", "torchao", "numpy")
UNKNOWN, CHANGED = "unknown", "+changes"  # commits that do not name one state of the code
KEY = ("bench", "case", "side", "dtype", "device")  # what makes two rows the same measurement


@functools.cache
def device_name(kind: str) -> str:
    """The accelerator's name, or the processor's with its number of cores; "none" of what is counted."""
    if kind == "counted":
        return "none"
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


@functools.cache
def versions() -> dict[str, str]:
    """Python and every package that takes part; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """Short hash of the checkout, with "+changes" where tracked files differ; without git, `UNIWORLD_COMMIT`."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
        return _git("rev-parse", "--short=10", "HEAD") + (CHANGED if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("UNIWORLD_COMMIT", UNKNOWN)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stamp(kind: str) -> dict[str, Any]:
    """What every row says about where it comes from; `kind` is "cpu", "cuda", or "counted" where no clock ran."""
    import torch

    place = {"device": device_name(kind), "kind": kind}
    if kind == "cpu":
        place["threads"] = torch.get_num_threads()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**place, "versions": versions(), "commit": commit(), "date": now}


def write(folder: Path | None, row: dict[str, Any]) -> None:
    """Append a row to its bench's file; nothing where no folder was asked for."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{row['bench']}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of a folder in the order measured, of each measurement the last."""
    latest: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = tuple(row[name] for name in KEY)
            latest.pop(key, None)
            latest[key] = row
    return list(latest.values())


def sides_written(folder: Path | None, bench: str, case: str, dtype: str, kind: str) -> set[str]:
    """The sides of a case that have rows in a folder, of this commit and of this machine's device.

    None where the tree differs from its commit, or nobody knows it: the rows may be those of other code.
    """
    if folder is None or not folder.is_dir() or commit() == UNKNOWN or commit().endswith(CHANGED):
        return set()
    wanted = {"bench": bench, "case": case, "dtype": dtype, "device": device_name(kind), "commit": commit()}
    return {row["side"] for row in select(read(folder), **wanted)}


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows whose fields equal `wanted`."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
