"""Items that are trained on again and again, kept in memory as they were made: the second time one costs nothing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class KeptItems:
    """The first `num` items; a loader process keeps those that it made."""

    def __init__(self, num: int):
        self.num = num
        self._kept: dict[int, Batch] = {}

    def take(self, seeds: Sequence[int], make: Callable[[Sequence[int]], Batch]) -> Batch:
        """The items of `seeds`, counted round and round.

        Args:
            make: item numbers -> tensors [B, ...], whose other sizes are the same for every batch.
        """
        numbers = [seed % self.num for seed in seeds]
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        if missing:
            made = make(missing)
            for row, number in enumerate(missing):
                self._kept[number] = {name: tensor[row] for name, tensor in made.items()}
        rows = [self._kept[number] for number in numbers]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
