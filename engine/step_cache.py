"""Step caching: steps that leave out most blocks of the DiT. Lossy, and only on request.

Neighbouring steps change an image's stream through the blocks by nearly the same amount. "first_block" runs the first
block of every step, and where its update has changed little since the last computed step, adds what the other blocks
added then. "taylor" computes every few steps only, and extrapolates in between what all blocks add.

Letters: B batch, L packed image tokens, D channels of the DiT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from uniworld.engine.request import Request, StepCacheReport
from uniworld.engine.steps import AllBlocks, Predictor, PreparedBatch, PreparedPass
from uniworld.models.flux import PassPlan, Streams


def predictor(batch: PreparedBatch, request: Request) -> Predictor:
    """What `request.cache` asks for; the settings of one job are those of its whole batch."""
    if request.cache == "first_block":
        return FirstBlockCache(batch, request.cache_threshold)
    if request.cache == "taylor":
        return TaylorCache(batch, request.cache_interval, request.cache_order)
    return AllBlocks(batch)


@dataclass
class Started:
    """One pass of a step behind its first block."""

    plan: PassPlan
    streams: Streams
    update: Tensor  # what the first block added to the image's stream [B, L, D]


@dataclass
class Kept:
    """Of each sample's last computed step: what the first block added to the image's stream, and what the rest did."""

    update: Tensor  # [B, L, D]
    rest: Tensor | None = None  # [B, L, D]; None until the first step is finished


class FirstBlockCache:
    """Leaves out all but the first block where that block's update has changed by less than a threshold.

    Every sample of a batch decides for itself, so that it gets the picture that it would get alone; its passes decide
    together, by the larger change, because true CFG magnifies what differs between them. The decision is made on the
    host, which waits for one number a sample and step; at threshold 0 there is nothing to decide.
    """

    def __init__(self, batch: PreparedBatch, threshold: float):
        self.batch, self.threshold = batch, threshold
        self.kept: list[Kept] = []
        self.computed: list[list[bool]] = []  # of each step, of each sample
        self.changes: list[Tensor] = []  # of each step from the second on, [B]

    def __call__(self, latents: Tensor, step: int) -> list[Tensor]:
        started = [self._start(prepared, latents, step) for prepared in self.batch.passes]
        computed = self._decide(started)
        self.computed.append(computed)
        if not self.kept:
            self.kept = [Kept(s.update) for s in started]
        return [
            whole(self._finish(prepared, s, kept, computed), s.plan)
            for prepared, s, kept in zip(self.batch.passes, started, self.kept)
        ]

    def reports(self) -> list[StepCacheReport | None]:
        changes = torch.stack(self.changes, dim=1).tolist() if self.changes else [[]] * len(self.batch.latents)
        return [
            StepCacheReport(tuple(step[i] for step in self.computed), (None, *of_sample))
            for i, of_sample in enumerate(changes)
        ]

    def _start(self, prepared: PreparedPass, latents: Tensor, step: int) -> Started:
        model, plan = prepared.model, prepared.plan(latents.shape[1], step, self.batch.pe)
        own, txt = prepared.own(latents, plan)
        img = model.x_embedder(own)
        streams = model.first_block(img, txt, plan)
        return Started(plan, streams, streams.img - img)

    def _decide(self, started: Sequence[Started]) -> list[bool]:
        """Whether the other blocks run, of each sample."""
        if not self.kept:
            return [True] * len(self.batch.latents)
        of_passes = [relative_change(s.update, kept.update, s.plan) for s, kept in zip(started, self.kept)]
        self.changes.append(torch.stack(of_passes).amax(0))
        if self.threshold == 0:
            return [True] * len(self.batch.latents)
        return [not change < self.threshold for change in self.changes[-1].tolist()]  # NaN computes

    def _finish(self, prepared: PreparedPass, started: Started, kept: Kept, computed: list[bool]) -> Tensor:
        """The velocity of a pass [B, L, C], of the tokens that are here."""
        model, streams = prepared.model, started.streams
        if all(computed):
            img, velocity = model.remaining_blocks(streams, started.plan)
            kept.update, kept.rest = started.update, img - streams.img
            return velocity
        reused = model.output(streams.img + kept.rest, started.plan)
        rows = [i for i, c in enumerate(computed) if c]
        if not rows:
            return reused
        part = tree_map_only(Tensor, partial(take, rows=rows), streams)
        img, velocity = model.remaining_blocks(part, plan_of(started.plan, rows))
        for at, i in enumerate(rows):
            kept.update[i], kept.rest[i] = started.update[i], img[at] - part.img[at]
            reused[i] = velocity[at]
        return reused


class TaylorCache:
    """Computes the first steps and then every `interval`-th, and extrapolates in between what all blocks add.

    The extrapolation is the polynomial in sigma through the last `order` + 1 computed steps. Which steps are computed
    is known beforehand, so that the host waits for nothing.
    """

    def __init__(self, batch: PreparedBatch, interval: int, order: int):
        self.batch, self.interval, self.order = batch, interval, order
        self.sigmas: list[float] = []  # of the last order + 1 computed steps
        self.residuals: list[list[Tensor]] = [[] for _ in batch.passes]  # at those, [B, L, D] each
        self.computed: list[bool] = []
        self.changes: list[Tensor | None] = []  # of each step, [B]

    def computes(self, step: int) -> bool:
        return step <= self.order or (step - self.order) % self.interval == 0

    def __call__(self, latents: Tensor, step: int) -> list[Tensor]:
        sigma, self.changes = self.batch.sigmas[step], [*self.changes, None]
        self.computed.append(self.computes(step))
        run = self._compute if self.computed[-1] else self._extrapolate
        velocities = [
            run(prepared, residuals, latents, step) for prepared, residuals in zip(self.batch.passes, self.residuals)
        ]
        if self.computed[-1]:
            self.sigmas = [*self.sigmas, sigma][-self.order - 1 :]
        return velocities

    def reports(self) -> list[StepCacheReport | None]:
        known = [change for change in self.changes if change is not None]
        rows = torch.stack(known, dim=1).tolist() if known else [[]] * len(self.batch.latents)
        reports = []
        for row in rows:
            values = iter(row)
            changes = tuple(None if change is None else next(values) for change in self.changes)
            reports.append(StepCacheReport(tuple(self.computed), changes))
        return reports

    def _compute(self, prepared: PreparedPass, residuals: list[Tensor], latents: Tensor, step: int) -> Tensor:
        model, plan = prepared.model, prepared.plan(latents.shape[1], step, self.batch.pe)
        own, txt = prepared.own(latents, plan)
        start = model.x_embedder(own)
        img, velocity = model.remaining_blocks(model.first_block(start, txt, plan), plan)
        residual = img - start
        if len(residuals) == self.order + 1:
            change = relative_change(extrapolate(self.sigmas, residuals, self.batch.sigmas[step]), residual, plan)
            self.changes[-1] = change if self.changes[-1] is None else torch.maximum(self.changes[-1], change)
            del residuals[0]
        residuals.append(residual)
        return whole(velocity, plan)

    def _extrapolate(self, prepared: PreparedPass, residuals: list[Tensor], latents: Tensor, step: int) -> Tensor:
        model, plan = prepared.model, prepared.plan(latents.shape[1], step, self.batch.pe)
        own, _ = prepared.own(latents, plan)
        residual = extrapolate(self.sigmas, residuals, self.batch.sigmas[step])
        return whole(model.output((model.x_embedder(own) + residual).to(latents.dtype), plan), plan)


def relative_change(new: Tensor, old: Tensor, plan: PassPlan) -> Tensor:
    """Sum of |new - old| over the sum of |old|, of each sample: [B, L, D] -> [B] fp32, over the tokens of all
    processes, so that all decide alike."""
    norm = partial(torch.linalg.vector_norm, ord=1, dim=(1, 2), dtype=torch.float32)
    sums = torch.stack([norm(new - old), norm(old)])
    if plan.attention.exchange is not None:
        sums = plan.attention.exchange.total(sums)
    return sums[0] / sums[1]


def whole(velocity: Tensor, plan: PassPlan) -> Tensor:
    """The velocity of all tokens, from that of the tokens that are here."""
    exchange = plan.attention.exchange
    return velocity if exchange is None else exchange.gather_img(velocity)


def plan_of(plan: PassPlan, rows: Sequence[int]) -> PassPlan:
    """The plan of some samples of a batch."""
    lengths = plan.attention.lengths and tuple(plan.attention.lengths[i] for i in rows)
    doubles, singles, output = tree_map_only(
        Tensor, partial(take, rows=rows), (plan.doubles, plan.singles, plan.output)
    )
    return PassPlan(plan.num_img, doubles, singles, output, plan.attention._replace(lengths=lengths))


def extrapolate(points: Sequence[float], values: Sequence[Tensor], at: float) -> Tensor:
    """The polynomial through `values` at `points`, of degree one less than their number, evaluated at `at`; fp32."""
    total = torch.zeros_like(values[0], dtype=torch.float32)
    for j, (point, value) in enumerate(zip(points, values)):
        weight = 1.0
        for other in (*points[:j], *points[j + 1 :]):
            weight *= (at - other) / (point - other)
        total.add_(value, alpha=weight)
    return total


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of the batch as a copy; by slices, since an index would have to be sent to the device."""
    return torch.cat([x[i : i + 1] for i in rows])
