"""The command `train-part`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniworld.train.parts.config import PartConfig


def train_part(path: Path, overrides: Sequence[str], minutes: float | None, quiet: bool) -> int:
    """Train a part; once it is finished, score and export it. Returns the exit code."""
    from uniworld.cli_draw import silence_libraries
    from uniworld.train.parts import make_part
    from uniworld.train.parts.config import load_part_config
    from uniworld.train.parts.loop import PartTrainer

    silence_libraries()
    config = as_this_machine_computes(load_part_config(path, overrides), quiet)
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


def as_this_machine_computes(config: "PartConfig", quiet: bool) -> "PartConfig":
    """The config with fp32 in the place of a bf16 that would only be emulated."""
    from uniworld.checkpoint.precision import default_device, emulates_bf16

    if config.dtype == "fp32" or not emulates_bf16(default_device()):
        return config
    if not quiet:
        print(f"dtype={config.dtype}: fp32 here, for this CPU does not compute in bf16", file=sys.stderr)
    return dataclasses.replace(config, dtype="fp32")
