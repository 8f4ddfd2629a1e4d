"""Where every op stands under the roof of its device: what it reaches, against what copying and multiplying would.

Of the rows of `bench/ops.py`: intensity is FLOPs over the least bytes, as each op states both. The ceilings are rows of
the same bench, `ceiling, ...`: a copy in GB/s, matrix products in TFLOP/s. `python bench/plot.py` draws it.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BENCH, CEILING = "ops", "ceiling, "
MARKS = {"bfloat16": ("o", "#1b6ca8"), "float32": ("s", "#d98e04")}
GRID = {"linewidth": 0.3, "color": "#cccccc"}
Row = dict[str, Any]


def measured(rows: list[Row]) -> list[Row]:
    """The forward passes of our side, of one device."""
    found = [row for row in rows if row["bench"] == BENCH and row["side"] == "ours" and "gb_s" in row]
    return [row for row in found if not row["case"].startswith(CEILING)]


def ceilings(rows: list[Row], unit: str) -> dict[str, float]:
    """Name and rate of the ceilings in "gb_s" or "tflop_s"."""
    found = [row for row in rows if row["bench"] == BENCH and row["case"].startswith(CEILING)]
    return {row["case"].removeprefix(CEILING): row[unit] for row in found if unit in row}


def intensity(row: Row) -> float:
    """FLOPs for each byte that must move."""
    return row["tflop_s"] * 1e12 / (row["gb_s"] * 1e9)


def draw(rows: list[Row], title: str) -> Figure:
    """Left the ops that multiply, under the roof; right those that only move bytes, against copying."""
    ours = measured(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    roof(left, [row for row in ours if row["tflop_s"] > 0], ceilings(rows, "gb_s"), ceilings(rows, "tflop_s"))
    bandwidths(right, [row for row in ours if row["tflop_s"] == 0], ceilings(rows, "gb_s"))
    if not any(row["case"].startswith(CEILING) for row in rows):
        title += "; the run measured no ceilings"
    figure.suptitle(title, fontsize=9)
    return figure


def roof(axes: Axes, ours: list[Row], copying: dict[str, float], products: dict[str, float]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.grid(True, **GRID)
    for dtype, (mark, colour) in MARKS.items():
        found = [row for row in ours if row["dtype"] == dtype]
        axes.plot([intensity(row) for row in found], [row["tflop_s"] for row in found], mark, color=colour, label=dtype)
    for row in ours:
        at = (intensity(row), row["tflop_s"])
        axes.annotate(row["op"], at, xytext=(4, 3), textcoords="offset points", fontsize=6)
    ends = [min(map(intensity, ours), default=1) / 2, max(map(intensity, ours), default=1) * 4]
    for name, gb_s in copying.items():
        axes.plot(ends, [end * gb_s / 1e3 for end in ends], "k-", linewidth=0.8, label=f"{name}, {gb_s:.3g} GB/s")
    for name, tflop_s in products.items():
        axes.plot(ends, [tflop_s] * 2, "--", linewidth=0.8, label=f"{name}, {tflop_s:.3g} TFLOP/s")
    axes.margins(x=0.25)
    axes.legend(fontsize=7, loc="lower right")


def bandwidths(axes: Axes, ours: list[Row], copying: dict[str, float]) -> None:
    axes.grid(True, axis="x", **GRID)
    axes.barh(range(len(ours)), [row["gb_s"] for row in ours], color=[MARKS[row["dtype"]][1] for row in ours])
    axes.set_yticks(range(len(ours)), [row["case"] for row in ours], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of ops that state no FLOPs")
    for name, gb_s in copying.items():
        axes.axvline(gb_s, color="black", linewidth=0.8, label=f"{name}, {gb_s:.3g} GB/s")
    if copying:
        axes.legend(fontsize=7)


def save(rows: list[Row], title: str, path: Path) -> None:
    figure = draw(rows, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
