"""The command `train-part`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def train_part(path: Path, overrides: Sequence[str], minutes: float | None, quiet: bool) -> int:
    """Train a part; once it is finished, score and export it. Returns the exit code."""
    from uniworld.cli_draw import silence_libraries
    from uniworld.train.parts import make_part
    from uniworld.train.parts.config import load_part_config
    from uniworld.train.parts.loop import PartTrainer

    silence_libraries()
    config = load_part_config(path, overrides)
    trainer = PartTrainer(config, make_part(config), quiet=quiet)
    code = trainer.run(None if minutes is None else 60 * minutes)
    if code:
        return code
    scores, folder = trainer.finish()
    print(json.dumps(scores, indent=1))
    print(folder, flush=True)
    if not quiet:
        print(f"{config.part}: {config.num_steps:,} steps; the averaged weights are in {folder}", file=sys.stderr)
    return 0
