"""What a run tells about itself: a line of JSON a step, a progress bar, and TensorBoard or wandb if asked.

`run_dir/metrics.jsonl` is complete and in order of steps also after a resume: lines of steps that are done again go.
Only rank 0 writes.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from uniworld.config import TrainConfig, to_dict
from uniworld.train.checkpoints import flush_file

METRICS_FILE = "metrics.jsonl"
GIB = 1024**3
LINE_EVERY_S = 10.0  # without a terminal, a line instead of a bar


class Metrics:
    """Takes one record a step and passes it on.

    Args:
        config: of the run.
        rank: other ranks than 0 write nothing.
        first_step: steps done before, by an earlier process.
        quiet: no progress on stderr.
    """

    def __init__(self, config: TrainConfig, *, rank: int, first_step: int = 0, quiet: bool = False):
        self.active = rank == 0
        if not self.active:
            return
        path = Path(config.run_dir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        forget_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._sinks = list(_sinks(config))
        self._shown = None if quiet else _Shown(config.num_steps, first_step)

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Note a record: numbers by name; what is not finite becomes null in the file, as JSON has no NaN."""
        if not self.active:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.log(step, record)
        if self._shown is not None:
            self._shown.show(step, record)

    def note(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if self.active and self._shown is not None:
            self._shown.print(text)

    def close(self) -> None:
        if not self.active:
            return
        flush_file(self._file)
        self._file.close()
        for sink in self._sinks:
            sink.close()
        if self._shown is not None:
            self._shown.close()


def read_metrics(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run; a last line that a kill cut off is left out.

    Raises: FileNotFoundError where there are none.
    """
    path = Path(run_dir) / METRICS_FILE
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, which are about to be done again; replaces the file at once."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(path.parent) if record["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class _Shown:
    """A bar on a terminal, and elsewhere a line from time to time."""

    def __init__(self, num_steps: int, first_step: int):
        self.num_steps, self._last_line_s = num_steps, -math.inf
        self.console = Console(stderr=True)
        self._bar: _Bar | None = None
        if self.console.is_terminal:
            self._bar = _Bar("training", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step)
            self._bar.start()

    def show(self, step: int, record: dict[str, Any]) -> None:
        text = described(record)
        if self._bar is not None:
            self._bar.figures = text
            self._bar.update(self._task, completed=step)
        elif step == self.num_steps or time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self.print(f"step {step}/{self.num_steps}  {text}")

    def print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Bar(Progress):
    """A bar with the figures of the last record below it, so that both fit a narrow terminal."""

    figures = ""

    def get_renderables(self) -> Iterator[Any]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, no_wrap=True, overflow="ellipsis")


def described(record: dict[str, Any]) -> str:
    """The record as a reader wants it, in one line."""
    parts = [f"loss {record['loss']:.4f}", f"{record['step_s']:.2f} s/step", f"{record['images_per_s']:.2f} img/s"]
    if record.get("tokens_per_s") is not None:
        parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    parts.append(f"{record['memory_gib']:.1f} GiB")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    if record.get("skipped_steps"):
        parts.append(f"{record['skipped_steps']} skipped")
    if record.get("bad_samples"):
        parts.append(f"{record['bad_samples']} bad samples")
    return "  ".join(parts)


def _sinks(config: TrainConfig) -> Iterator[Any]:
    if config.tensorboard:
        yield _TensorBoard(config)
    if config.wandb_project is not None:
        yield _Wandb(config)


class _TensorBoard:
    def __init__(self, config: TrainConfig):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ValueError("tensorboard=true: pip install tensorboard") from None
        self.writer = SummaryWriter(str(Path(config.run_dir) / "tensorboard"))

    def log(self, step: int, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig):
        try:
            import wandb
        except ModuleNotFoundError:
            raise ValueError(f"wandb_project={config.wandb_project}: pip install wandb") from None
        name = Path(config.run_dir).name
        folder = str(Path(config.run_dir).resolve())
        self.run = wandb.init(
            project=config.wandb_project, name=name, id=name, resume="allow", dir=folder, config=to_dict(config)
        )

    def log(self, step: int, record: dict[str, Any]) -> None:
        self.run.log(record, step=step)

    def close(self) -> None:
        self.run.finish()
