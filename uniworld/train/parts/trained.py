"""The weights of parts that are trained already."""

from pathlib import Path

import torch
from torch import nn

from uniworld.checkpoint.build import encoder_plan
from uniworld.checkpoint.weights import fill
from uniworld.train.parts.config import PartConfig


def trained(config: PartConfig, name: str) -> Path:
    """The folder of another part's weights. Raises: FileNotFoundError where it is not trained yet."""
    folder = Path(config.parts) / name / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"parts: {folder} is not there; train it first (configs/tiny/{name}.yaml)")
    return folder


def fill_encoder(folder: Path, module: nn.Module) -> None:
    """Give `module` the weights of a transformers folder, fp32 and frozen."""
    plan = encoder_plan(folder, module, torch.device("cpu"), torch.float32)
    plan.check()
    fill([plan])
