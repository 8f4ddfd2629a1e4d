"""Reads the parts of a checkpoint, of any ZeRO stage and number of ranks, without starting ranks.

Slices say of which parameter they are and from which element on. Tensors are mapped from the files, not read at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from uniworld.train.checkpoints import DEEPSPEED, Checkpoint


def rank_file(rank: int) -> str:
    return f"ranks/rank-{rank:05d}.pt"


def ema_file(rank: int) -> str:
    return f"ema/rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class SavedOptimizer:
    """One rank's optimizer as DeepSpeed saved it; tensors are mapped from the file."""

    masters: list[Tensor]
    """The flat fp32 partitions, of which padding at the end may be cut off."""
    states: list[dict[str, Any]]
    """What the optimizer keeps of each partition."""


def read_optimizer(checkpoint: Checkpoint, rank: int) -> SavedOptimizer:
    """Raises: ModuleNotFoundError without DeepSpeed, whose classes the file holds."""
    (path,) = (checkpoint.folder / DEEPSPEED).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    zero3 = "fp32_flat_groups" in saved
    masters = saved["fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"]
    states = saved["optimizer_state_dict" if zero3 else "base_optimizer_state"]["state"]
    return SavedOptimizer([m.detach() for m in masters], [states[i] for i in sorted(states)])


def read_rank(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """Random states, what the trainer gave, and the layout of the partitions of one rank."""
    return torch.load(checkpoint.folder / rank_file(rank), map_location="cpu", weights_only=False)


def saved_masters(checkpoint: Checkpoint) -> Iterator[tuple[str, int, Tensor]]:
    """The slices of a checkpoint's fp32 master weights: parameter, offset in it, [n] fp32."""
    for rank in range(checkpoint.world_size):
        masters = read_optimizer(checkpoint, rank).masters
        for name, offset, numel, index, position in read_rank(checkpoint, rank)["layout"]:
            yield name, offset, masters[index][position : position + numel]


def saved_ema(checkpoint: Checkpoint) -> Iterator[tuple[str, int, Tensor]]:
    """The slices of a checkpoint's EMA: parameter, offset in it, [n] fp32."""
    for rank in range(checkpoint.world_size):
        path = checkpoint.folder / ema_file(rank)
        with safe_open(path, framework="pt") as file:
            for key in file.offset_keys():
                name, _, offset = key.rpartition("@")
                yield name, int(offset), file.get_tensor(key)


class TrainedWeights:
    """Whole trained parameters of a checkpoint, put together from the ranks' slices one at a time.

    Args:
        checkpoint: what to read.
        ema: the average instead of the optimizer's fp32 master weights.

    Raises: ValueError where the checkpoint has no EMA.
    """

    def __init__(self, checkpoint: Checkpoint, *, ema: bool):
        if ema and checkpoint.manifest["ema_updates"] is None:
            raise ValueError(f"{checkpoint.folder}: was saved without EMA")
        self.shapes = {name: tuple(shape) for name, shape in checkpoint.manifest["trained"].items()}
        self._slices: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.shapes}
        for name, offset, values in (saved_ema if ema else saved_masters)(checkpoint):
            self._slices[name].append((offset, values))
        for name, shape in self.shapes.items():
            covered = sum(values.numel() for _, values in self._slices[name])
            if covered != torch.Size(shape).numel():
                raise ValueError(f"{checkpoint.folder}: holds {covered} elements of {name}, whose shape is {shape}")

    def __getitem__(self, name: str) -> Tensor:
        """One parameter in fp32."""
        whole = torch.empty(self.shapes[name])
        for offset, values in self._slices[name]:
            whole.view(-1)[offset : offset + values.numel()] = values
        return whole
