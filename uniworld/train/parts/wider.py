"""The same training in fewer and wider steps, for a device that one small batch does not fill."""

import math
from pathlib import Path

from uniworld.config import load_config, read_yaml
from uniworld.train.parts.config import load_part_config


def widened(path: Path, factor: int) -> tuple[str, ...]:
    """Overrides of a training's YAML file: `factor` times the batch and a `factor`-th of the steps, on the same items.

    Rates of learning grow by the root of `factor`, as fits Adam and its like (Malladi et al., 2022, On the SDEs and
    Scaling Rules for Adaptive Gradient Algorithms), and averages forget as much with each item as before.
    """
    if factor == 1:
        return ()
    if "part" in read_yaml(path):
        config = load_part_config(path)
        batch, batch_size = "batch_size", config.batch_size
    else:
        config = load_config(path)
        batch, batch_size = "data.batch_size", config.data.batch_size
    optim, faster = config.optim, math.sqrt(factor)
    changes = {
        "num_steps": math.ceil(config.num_steps / factor),
        batch: factor * batch_size,
        "optim.warmup_steps": math.ceil(optim.warmup_steps / factor),
        "optim.lr": f"{faster * optim.lr:.4g}",
        "ema.decay": f"{config.ema.decay**factor:.6g}",
    }
    if optim.name == "muon":
        changes["optim.muon_lr"] = f"{faster * optim.muon_lr:.4g}"
    return tuple(f"{name}={value}" for name, value in changes.items())
