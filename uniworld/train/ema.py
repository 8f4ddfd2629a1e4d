"""Exponential moving average of the trained parameters, of which each rank keeps its own share in fp32.

An update is one fused launch over this rank's share and no communication. Whole parameters come together only where
somebody looks at them: `ShardedEMA.swapped_in` for validation. What is saved are slices that say of which parameter
they are and from which element on, so that any number of ranks can take them up again.

Source of the decay schedule: the authors' `EMAModel`, after diffusers.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from uniworld.config import EMAConfig
from uniworld.kernels.ema_update import ema_update
from uniworld.train.sharding import Sharded, Slice

ALIGNMENT = 16  # elements at which a run of the average starts: the kernel reads such runs in 16-byte pieces


def decay_at(step: int, config: EMAConfig) -> float:
    """The decay of update `step`, counted from 1; 0 copies the parameters."""
    s = max(0, step - config.update_after_step - 1)
    if s <= 0:
        return 0.0
    decay = 1 - (1 + s / config.inv_gamma) ** -config.power if config.warmup else (1 + s) / (10 + s)
    return max(min(decay, config.decay), config.min_decay)


class ShardedEMA:
    """The average of this rank's slices; it starts as a copy of them.

    Args:
        sharded: whose trained parameters are averaged.
        config: schedule, and whether fp32 master weights or compute parameters are averaged.

    Attributes:
        num_updates: how often `update` was called; the schedule's step.
        flat: [n] fp32, the average of this rank.
    """

    def __init__(self, sharded: Sharded, config: EMAConfig):
        self.sharded, self.config, self.num_updates = sharded, config, 0
        slices = sharded.slices(config.source)
        sizes = [sum(s.numel for s in run) for run in _runs(slices)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        device = slices[0].tensor.device if slices else sharded.world.device  # masters may be in host memory
        self.flat = torch.zeros(starts[-1], dtype=torch.float32, device=device)
        self._averages = [self.flat[start : start + size] for start, size in zip(starts, sizes)]
        self.restart()

    @property
    def num_bytes(self) -> int:
        """Memory of the average on this rank."""
        return self.flat.nbytes

    def bind(self) -> None:
        """Find anew where the slices lie, after a checkpoint was loaded into the optimizer."""
        runs = _runs(self.sharded.slices(self.config.source))
        assert [sum(s.numel for s in run) for run in runs] == [a.numel() for a in self._averages]
        self._sources = [_span(run) for run in runs]
        self._slices = []
        for run, average in zip(runs, self._averages):
            for piece, values in zip(run, average.split([s.numel for s in run])):
                self._slices.append(Slice(piece.name, piece.offset, piece.flat_offset, values))

    def restart(self) -> None:
        """Copy the parameters as they are now, and count updates from 0."""
        self.bind()
        ema_update(self._averages, self._sources, 0.0)
        self.num_updates = 0

    def update(self) -> float:
        """Move the average towards the parameters, once an optimizer step; returns the decay used."""
        self.num_updates += 1
        decay = decay_at(self.num_updates, self.config)
        ema_update(self._averages, self._sources, decay)
        return decay

    def slices(self) -> list[Slice]:
        """The average in fp32, as views, in the order of `Sharded.slices`."""
        return list(self._slices)

    def load(self, saved: Iterable[tuple[str, int, Tensor]], num_updates: int) -> None:
        """Take the average from slices of any number of ranks, given as (name, offset, [n] fp32).

        Raises: ValueError where they do not cover what this rank holds.
        """
        self.bind()
        mine = {piece.name: piece for piece in self._slices}  # a rank holds at most one slice of a parameter
        missing = sum(piece.numel for piece in self._slices)
        for name, offset, values in saved:
            if (piece := mine.get(name)) is None:
                continue
            first = max(offset, piece.offset)
            last = min(offset + values.numel(), piece.offset + piece.numel)
            if first < last:
                place = piece.tensor[first - piece.offset : last - piece.offset]
                place.copy_(values[first - offset : last - offset])
                missing -= last - first
        if missing:
            raise ValueError(f"the checkpoint's EMA lacks {missing} elements of this rank's share")
        self.num_updates = num_updates

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the compute parameters hold the average; afterwards exactly what they held before. All ranks."""
        kept = [piece.tensor.clone() for piece in self.sharded.slices("params")]
        try:
            self.sharded.write_params([piece.tensor for piece in self._slices])
            yield
        finally:
            self.sharded.write_params(kept, dtype=self.sharded.dtype)


def _runs(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices whose memory follows one another, so that a partition is one tensor for the kernel."""
    runs: list[list[Slice]] = []
    for piece in slices:
        if runs and _follows(runs[-1][-1].tensor, piece.tensor):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _follows(a: Tensor, b: Tensor) -> bool:
    same_storage = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return same_storage and a.dtype == b.dtype and a.data_ptr() + a.nbytes == b.data_ptr()


def _span(run: Sequence[Slice]) -> Tensor:
    """The memory of a run as one 1-D view."""
    return run[0].tensor.as_strided((sum(s.numel for s in run),), (1,))
