"""Batches without end, in an order that follows from the seed, with a position that a resume finds again.

What `num_workers` processes have prefetched is no part of the position: it counts batches that were handed out.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from uniworld.config import TrainConfig
from uniworld.data.bad import BadSamples, TooManyBadSamples
from uniworld.data.batch import TrainBatch
from uniworld.data.collate import Collator, SiglipPreprocess
from uniworld.data.dataset import Dataset
from uniworld.data.plan import EpochPlan, Mixture, Planner, forward_flops
from uniworld.data.reader import BatchReader, Loaded, Reader, init_worker, prepare_to_fork
from uniworld.data.tokens import estimate_tokens, sort_into_buckets
from uniworld.models.prompts import PromptProcessor

SIGLIP_TOKENS = 1024  # semantic tokens a reference at full scale
MAX_TRIES = 200  # batches of bad samples in a row, whatever share of bad samples is allowed
NEAR_COST = 1.02  # batches whose costs differ by less may stand for each other
log = logging.getLogger("uniworld.data")


@dataclass
class Position:
    """The next batch to hand out: `step` of `epoch`, whose plan began with `carried`.

    taken: for each epoch, the steps whose batch was handed out early, in place of a bad one.
    """

    epoch: int = 0
    step: int = 0
    carried: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    taken: dict[int, set[int]] = field(default_factory=dict)


class Loader:
    """An endless iterator of this rank's batches.

    Args:
        processor: of the model; the training settings are made from `config`.
        siglip_preprocess: the semantic encoder's view of reference pictures, or None where it is not used.
        siglip_tokens: semantic tokens a reference, for the cost; by default those of full scale.
        bad_log: gets every bad sample as a JSON line.
        progress: called with (headers read, headers to read) while a new source is indexed.

    Attributes:
        bad: the `BadSamples` report of this rank.
        epoch: of the next batch. num_steps_per_epoch: batches that a rank gets from the current epoch.

    Raises:
        ValueError, FileNotFoundError: a source cannot be used. TooManyBadSamples: here or from `next`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        processor: PromptProcessor,
        siglip_preprocess: SiglipPreprocess | None = None,
        rank: int = 0,
        world_size: int = 1,
        siglip_tokens: int | None = None,
        bad_log: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to {world_size - 1}")
        self.config, self.rank, self.world_size = config, rank, world_size
        self.dataset = Dataset(config.data.sources)
        self.bad = BadSamples(config.data.max_bad_share, bad_log)
        self.index = self.dataset.read_index(progress)
        self._record_unusable()
        if siglip_tokens is None:
            siglip_tokens = SIGLIP_TOKENS if siglip_preprocess is not None else 0
        collator = Collator(config.data, processor, siglip_preprocess)
        buckets, sizes = sort_into_buckets(self.index, config)
        tokens = estimate_tokens(self.dataset, self.index, collator.processor, buckets, sizes, siglip_tokens)
        self._begin(BatchReader(self.dataset, collator, buckets, sizes, config), self.dataset.groups, buckets, tokens)

    def _begin(
        self, reader: Reader, groups: Sequence[tuple[int, int, float]], buckets: np.ndarray, tokens: np.ndarray
    ) -> None:
        """Plan from the first epoch on.

        Args:
            reader: makes `Loaded` of the items of a planned batch.
            groups: (first, end, weight) of each source; buckets, tokens: [N], of each sample.
        """
        self.reader, usable = reader, self.index.usable
        drawn = [(usable[(usable >= first) & (usable < end)], weight) for first, end, weight in groups]
        self.planner = Planner(
            Mixture(drawn, self.config.seed),
            buckets,
            forward_flops(tokens),
            batch_size=self.config.data.batch_size,
            world_size=self.world_size,
        )
        self._position = Position()
        self._plans: dict[int, EpochPlan] = {}
        self._arrivals: Iterator[Loaded] | None = None
        self._fingerprint = self._hash([weight for _, _, weight in groups], buckets, tokens)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> TrainBatch:
        if self._arrivals is None:
            self._arrivals = self._start()
        at = self._position
        self._skip_empty_epochs()
        loaded = next(self._arrivals)
        cost = float(self._plan(at.epoch).costs[at.step, self.rank])
        if at.step in at.taken.get(at.epoch, ()):
            loaded = None
        else:
            self._record(loaded)
        num_tries = 0
        while loaded is None or loaded.batch is None:
            if (num_tries := num_tries + 1) > MAX_TRIES:
                message = f"data.sources: {MAX_TRIES} batches in a row had no usable sample"
                raise TooManyBadSamples(message, self.bad.table())
            epoch, step = self._substitute(cost)
            at.taken.setdefault(epoch, set()).add(step)
            loaded = self.reader[_items(self._plan(epoch), step, self.rank)]
            self._record(loaded)
        at.step += 1
        if at.step == len(self._plan(at.epoch)):
            self._next_epoch()
        return loaded.batch

    @property
    def epoch(self) -> int:
        return self._position.epoch

    @property
    def num_steps_per_epoch(self) -> int:
        return len(self._plan(self._position.epoch))

    def close(self) -> None:
        """Stop the workers."""
        self._arrivals = None

    def state_dict(self) -> dict[str, Any]:
        """The position and the report of bad samples, as JSON takes them."""
        at = self._position
        return {
            "epoch": at.epoch,
            "step": at.step,
            "carried": at.carried.tolist(),
            "taken": {str(epoch): sorted(steps) for epoch, steps in at.taken.items()},
            "num_steps": self.num_steps_per_epoch,
            "fingerprint": self._fingerprint,
            "bad": self.bad.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was handed out last when `state` was taken.

        Where the data, the number of ranks or the batch size are others than then, the order is another too: the
        epoch goes on at the same share of it, with a warning.
        """
        self.close()
        self._plans = {}
        self.bad.load_state_dict(state["bad"])
        if state["fingerprint"] == self._fingerprint:
            self._position = Position(
                epoch=state["epoch"],
                step=state["step"],
                carried=np.array(state["carried"], np.int64).reshape(-1, 2),
                taken={int(epoch): set(steps) for epoch, steps in state["taken"].items()},
            )
            return
        share = state["step"] / max(1, state["num_steps"])
        self._position = Position(epoch=state["epoch"])
        self._position.step = int(share * len(self._plan(state["epoch"])))
        log.warning(
            "the data, the number of ranks or the batch size changed since the checkpoint: "
            "epoch %d goes on at %.0f %%, some of its samples are seen twice or not at all",
            state["epoch"],
            100 * share,
        )

    def _start(self) -> Iterator[Loaded]:
        """Read planned batches from the position on, ahead of time where there are workers."""
        num_workers = self.config.data.num_workers
        if num_workers:
            prepare_to_fork()
        return iter(
            DataLoader(
                self.reader,
                batch_size=None,
                sampler=_Ahead(self),
                num_workers=num_workers,
                collate_fn=_unchanged,
                prefetch_factor=2 if num_workers else None,
                # forked workers share the annotations; torch's global generator stays as it is
                multiprocessing_context="fork" if num_workers else None,
                generator=torch.Generator(),
                worker_init_fn=init_worker,
            )
        )

    def _plan(self, epoch: int) -> EpochPlan:
        if epoch not in self._plans:
            at = self._position
            carried = at.carried if epoch == at.epoch else self._plan(epoch - 1).carried
            self._plans[epoch] = self.planner.plan(epoch, carried)
        return self._plans[epoch]

    def _next_epoch(self) -> None:
        at = self._position
        at.carried = self._plan(at.epoch).carried
        at.taken.pop(at.epoch, None)
        self._plans.pop(at.epoch)
        at.epoch, at.step = at.epoch + 1, 0

    def _skip_empty_epochs(self) -> None:
        """Pass epochs that have no step, as with fewer samples than ranks; what they carry adds up."""
        while len(self._plan(self._position.epoch)) == 0:
            self._next_epoch()

    def _substitute(self, cost: float) -> tuple[int, int]:
        """A batch of this rank, as late in the epoch as can be, that costs what the bad one would have.

        So every rank stays at the cost of its neighbours (a single one has none, and takes any). When the epoch has
        none left, it is the next epoch's.
        """
        at = self._position
        for epoch in range(at.epoch, at.epoch + 1000):
            first = at.step + 1 if epoch == at.epoch else 0
            costs = self._plan(epoch).costs[first:, self.rank]
            free = np.array([first + i not in at.taken.get(epoch, ()) for i in range(len(costs))], bool)
            if not free.any():
                continue
            distance = np.where(free, np.abs(np.log(costs / cost)), np.inf)
            near = np.flatnonzero(free if self.world_size == 1 else distance <= np.log(NEAR_COST))
            if len(near):
                return epoch, first + int(near[-1])
            if epoch > at.epoch:
                return epoch, first + int(np.argmin(distance))
        raise AssertionError("every epoch has samples, so 1000 have a free batch")

    def _record(self, loaded: Loaded) -> None:
        self.bad.record(loaded.num_read, loaded.bad)

    def _record_unusable(self) -> None:
        """Count what the index found, and stop at once where that is too much of it."""
        num_samples = Counter()
        for source in self.dataset.parts:
            num_samples[source.name] += len(source)
        self.bad.record_unusable(num_samples, list(self.index.bad.values()), quiet=self.rank > 0)
        if not len(self.index.usable):
            raise ValueError(f"data.sources: none of {len(self.dataset)} samples can be used")

    def _hash(self, weights: list[float], buckets: np.ndarray, tokens: np.ndarray) -> str:
        settings = [self.config.seed, self.config.data.batch_size, self.world_size, weights]
        digest = hashlib.sha256(repr(settings).encode())
        for array in (self.index.rows, buckets, tokens.round().astype(np.int64)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]


class _Ahead:
    """What the workers read next: the plan from the loader's position on, in order."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[tuple[int, int], ...]]:
        loader = self.loader
        epoch, step = loader.epoch, loader._position.step
        while True:
            plan = loader._plan(epoch)
            for ahead in range(step, len(plan)):
                taken = ahead in loader._position.taken.get(epoch, ())
                yield () if taken else _items(plan, ahead, loader.rank)
            epoch, step = epoch + 1, 0


def _items(plan: EpochPlan, step: int, rank: int) -> tuple[tuple[int, int], ...]:
    return tuple((number, round) for number, round in plan.items[step, rank].tolist())


def _unchanged(loaded: Loaded) -> Loaded:
    return loaded
