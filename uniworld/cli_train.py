"""The command `train`."""

from collections.abc import Sequence
from pathlib import Path

from uniworld.config import load_config


def train(config: Path, overrides: Sequence[str], quiet: bool) -> int:
    """Run a training; returns the exit code."""
    settings = load_config(config, overrides)

    from uniworld.train.trainer import Trainer

    return Trainer(settings, quiet=quiet).run()
