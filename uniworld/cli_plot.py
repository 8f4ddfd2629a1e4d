"""The command `plot`."""

from collections.abc import Sequence
from pathlib import Path

from uniworld.train.plot import plot as draw


def plot(runs: Sequence[Path], output: Path | None) -> None:
    """Draw the curves and print the file's name."""
    print(draw(runs, output))
