"""The command `train`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from uniworld.config import load_config


def train(config: Path, overrides: Sequence[str], quiet: bool) -> int:
    """Run a training; returns the exit code."""
    settings = load_config(config, overrides)

    from uniworld.data.bad import TooManyBadSamples
    from uniworld.train.trainer import Trainer

    try:
        return Trainer(settings, quiet=quiet).run()
    except TooManyBadSamples as error:
        print(error.table, file=sys.stderr)
        raise ValueError(str(error).removesuffix(error.table)) from None
