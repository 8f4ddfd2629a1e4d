"""Latents, token ids and labels of the items that the base is trained on, kept on disk.

Drawing a picture and encoding it costs as much as a third of a training step, and is the same every time. The cache is
filled as items are first asked for, so that a run starts at once; the noise of the flow stays fresh.

Letters: N items, B of a batch, C latent channels, h, w latent height and width, T whole numbers an item.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MOMENTS, NUMBERS, READY = "moments.npy", "numbers.npy", "ready.npy"
Made = tuple[np.ndarray, np.ndarray]


class LatentCache:
    """Arrays of the first N items.

    Args:
        folder: of the cache; made where it is not there. It holds what `make` gave and knows nothing of how.
        num: N. moments: shape of an item, such as (2, C, h, w), kept in fp16. num_numbers: T.
        make: item numbers -> moments [B, ...] and numbers [B, T].
    """

    def __init__(
        self,
        folder: Path,
        num: int,
        moments: tuple[int, ...],
        num_numbers: int,
        make: Callable[[Sequence[int]], Made],
    ):
        self.make = make
        folder.mkdir(parents=True, exist_ok=True)
        self.moments = _open(folder / MOMENTS, (num, *moments), np.float16)
        self.numbers = _open(folder / NUMBERS, (num, num_numbers), np.int16)
        self.ready = _open(folder / READY, (num,), np.uint8)

    def __getitem__(self, numbers: Sequence[int]) -> Made:
        """moments fp16 [B, ...] and numbers int16 [B, T]; what is not there is made first."""
        missing = [n for n in dict.fromkeys(numbers) if not self.ready[n]]
        if missing:
            self.moments[missing], self.numbers[missing] = self.make(missing)
            self.ready[missing] = 1  # last: a run that is killed in between makes them again
        return self.moments[list(numbers)], self.numbers[list(numbers)]


def file_mark(path: Path) -> str:
    """Eight hex digits that differ for files of other content."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _open(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array in a file, zeros where it is new. Raises: ValueError where the file holds another."""
    if not path.is_file():
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}; remove its folder")
    return array
