"""The curves of runs, drawn from their `metrics.jsonl`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniworld.train.metrics import METRICS_FILE, read_metrics

CURVES_FILE = "curves.png"
SMOOTHING = 0.98  # of the loss's running mean
# (key in the records, title, whether the axis is logarithmic)
PANELS = (
    ("loss", "loss", False),
    ("lr", "learning rate", False),
    ("grad_norm", "gradient norm before clipping", True),
    ("images_per_s", "images a second", False),
    ("tokens_per_s", "tokens a second", False),
    ("step_s", "seconds a step", False),
)


def plot(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Draw the curves of one or several runs into one PNG.

    Args:
        output: by default `curves.png` in the first run's folder.

    Raises:
        FileNotFoundError: a folder has no metrics.
        ValueError: it has none yet, or matplotlib is missing.
    """
    figure = make_figure({label: _read(Path(folder)) for label, folder in zip(labels(run_dirs), run_dirs)})
    path = Path(output) if output is not None else Path(run_dirs[0]) / CURVES_FILE
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def make_figure(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Any:
    """A matplotlib figure with one panel a quantity and one line a run, from the records of each."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("matplotlib is missing; drawing curves needs: pip install matplotlib") from None
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, logarithmic) in zip(figure.subplots(2, 3).flat, PANELS):
        for number, (label, records) in enumerate(runs.items()):
            _draw(axes, series(records, key), label, f"C{number}", smoothed=key == "loss")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if logarithmic and any(value > 0 for records in runs.values() for value in series(records, key)[1]):
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize="small")
    return figure


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key; records without it, or where it was not finite, leave a gap (NaN)."""
    return [r["step"] for r in records], [math.nan if r.get(key) is None else float(r[key]) for r in records]


def smooth(values: Sequence[float], factor: float = SMOOTHING) -> list[float]:
    """Running mean with exponentially falling weights, without a bias at the start; gaps are passed over."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            total, weight = factor * total + (1 - factor) * value, factor * weight + 1 - factor
        found.append(total / weight if weight else math.nan)
    return found


def labels(run_dirs: Sequence[str | Path]) -> list[str]:
    """The folders' names, or whole paths where two are alike."""
    names = [Path(folder).resolve().name for folder in run_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in run_dirs]


def _read(folder: Path) -> list[dict[str, Any]]:
    if not (folder / METRICS_FILE).is_file():
        raise FileNotFoundError(f"{folder}: holds no {METRICS_FILE}, so it is no run folder")
    records = list(read_metrics(folder))
    if not records:
        raise ValueError(f"{folder}: {METRICS_FILE} has no step yet")
    return records


def _draw(axes: Any, points: tuple[list[int], list[float]], label: str, colour: str, *, smoothed: bool) -> None:
    steps, values = points
    marker = "." if len(steps) < 30 else None
    if not smoothed or len(steps) < 30:
        axes.plot(steps, values, color=colour, label=label, marker=marker, linewidth=1)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(steps, smooth(values), color=colour, label=label, linewidth=1.5)
