"""Which samples an epoch has, and which rank gets them when: batches of near equal cost at every step.

Everything follows from the seed, so that all ranks make the same plan without talking to each other.
Letters: N samples, B samples a batch, R ranks, G groups (steps) of an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLOPS_PER_TOKEN = 1.291e10  # of one DiT forward at full scale, linear layers
FLOPS_PER_PAIR = 7.004e5  # and attention, for each pair of tokens
MAX_COST_RATIO = 1.06  # of the batches of one step, largest to smallest, by estimated cost
SHUFFLE, MIX = 0, 1  # kinds of random draws


def forward_flops(num_tokens: np.ndarray | float) -> np.ndarray | float:
    """FLOPs of one DiT forward over `num_tokens` text and image tokens of one sample."""
    return FLOPS_PER_TOKEN * num_tokens + FLOPS_PER_PAIR * num_tokens**2


@dataclass(frozen=True)
class EpochPlan:
    """items: int64 [G, R, B, 2], sample number and pass of every place; costs: [G, R] in FLOPs.

    carried: int64 [n, 2], items that filled no group and wait for the next epoch.
    """

    items: np.ndarray
    costs: np.ndarray
    carried: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


class Mixture:
    """What an epoch draws from each group of sources.

    An epoch has as many samples as there are usable ones. Each group gives its share by weight, going through its own
    samples pass after pass, in a new order each time: none is repeated before all others had their turn.

    Args:
        groups: (numbers of the usable samples, weight) of each group.
    """

    def __init__(self, groups: Sequence[tuple[np.ndarray, float]], seed: int):
        self.groups = [(samples, weight) for samples, weight in groups if len(samples)]
        self.seed = seed
        num_samples = sum(len(samples) for samples, _ in self.groups)
        weights = np.array([weight for _, weight in self.groups])
        self.quotas = _apportion(num_samples, weights / weights.sum())

    def draw(self, epoch: int) -> np.ndarray:
        """Items of an epoch, int64 [N, 2]: sample number, and the pass through its group that it belongs to."""
        drawn = []
        for number, ((samples, _), quota) in enumerate(zip(self.groups, self.quotas)):
            position, end = epoch * quota, (epoch + 1) * quota
            while position < end:
                round, offset = divmod(position, len(samples))
                order = _random(self.seed, SHUFFLE, number, round).permutation(len(samples))
                taken = samples[order[offset : offset + end - position]]
                drawn.append(np.stack([taken, np.full_like(taken, round)], axis=1))
                position += len(taken)
        return np.concatenate(drawn)


class Planner:
    """Makes the plan of each epoch.

    Args:
        buckets: [N] int, which target size each sample has; samples of a batch share it.
        costs: [N], FLOPs of each sample; no matter for samples that are never drawn.
    """

    def __init__(
        self, mixture: Mixture, buckets: np.ndarray, costs: np.ndarray, *, batch_size: int, world_size: int
    ):
        self.mixture, self.buckets, self.costs = mixture, buckets, costs
        self.batch_size, self.world_size = batch_size, world_size

    def plan(self, epoch: int, carried: np.ndarray) -> EpochPlan:
        """The plan of `epoch`, given what the last one left; it may have no step where there are few samples."""
        B, R = self.batch_size, self.world_size
        rng = _random(self.mixture.seed, MIX, epoch)
        items = rng.permutation(np.concatenate([carried.reshape(-1, 2), self.mixture.draw(epoch)]))
        items, without_batch = self._whole_batches(items)
        costs = self.costs[items[:, 0]].reshape(-1, B).sum(axis=1)
        order = np.argsort(costs, kind="stable")
        groups = _equal_groups(costs[order], R, from_top=epoch % 2 == 1)
        grouped = order[groups]  # [G, R]
        ungrouped = np.ones(len(costs), bool)
        ungrouped[grouped.reshape(-1)] = False
        grouped = rng.permuted(rng.permutation(grouped), axis=1)
        batches = items.reshape(-1, B, 2)
        carried = np.concatenate([without_batch, batches[ungrouped].reshape(-1, 2)])
        return EpochPlan(batches[grouped], costs[grouped], carried)

    def _whole_batches(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items sorted so that each run of B shares a bucket and has similar costs, and those left over."""
        buckets = self.buckets[items[:, 0]]
        by_bucket = np.argsort(buckets, kind="stable")  # keeps the random order within a bucket
        starts = np.searchsorted(buckets[by_bucket], buckets[by_bucket])
        sizes = np.searchsorted(buckets[by_bucket], buckets[by_bucket], side="right") - starts
        whole = np.arange(len(items)) - starts < sizes - sizes % self.batch_size
        kept = items[by_bucket[whole]]
        order = np.lexsort((self.costs[kept[:, 0]], self.buckets[kept[:, 0]]))
        return kept[order], items[by_bucket[~whole]]


def _equal_groups(costs: np.ndarray, size: int, from_top: bool) -> np.ndarray:
    """Runs of `size` neighbours whose costs differ by at most MAX_COST_RATIO, [G, size] places in ascending `costs`.

    Looking from the other end in every other epoch, what was left out at one end of a cluster comes in next time.
    """
    if from_top:
        return len(costs) - 1 - _equal_groups(1 / costs[::-1], size, from_top=False)
    groups, first = [], 0
    near = costs[size - 1 :] <= MAX_COST_RATIO * costs[: max(0, len(costs) - size + 1)]
    while first < len(near):
        if near[first]:
            groups.append(first)
            first += size
        else:
            first += 1
    return np.array(groups, np.int64)[:, None] + np.arange(size)


def _apportion(total: int, shares: np.ndarray) -> list[int]:
    """Whole numbers near `total * shares` that sum to `total`, none of them 0."""
    exact = total * shares
    counts = np.maximum(1, np.floor(exact)).astype(int)
    for place in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, total - counts.sum())]:
        counts[place] += 1
    return counts.tolist()


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
