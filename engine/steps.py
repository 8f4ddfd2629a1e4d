"""What the step loop works on, and the plain way to take a step.

Letters: B batch, N steps, L packed image tokens, C latent channels, D channels of the DiT.
"""

import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from uniworld.engine.parallel import ParallelFlux
from uniworld.engine.request import StepCacheReport
from uniworld.kernels.flow_step import flow_step
from uniworld.models.blocks import Rope
from uniworld.models.conditioning import Conditioning
from uniworld.models.flux import FluxTransformer, PassPlan

DiT = FluxTransformer | ParallelFlux


class PreparedPass:
    """One conditioning made ready for all steps: projected text and the modulation of every step in one table."""

    def __init__(self, model: DiT, conditioning: Conditioning, sigmas: Tensor, guidance: Tensor | None):
        self.model = model
        self.txt = model.embed_txt(conditioning.txt)
        self.txt_lengths = conditioning.lengths_if_padded
        self.table = model.modulation(sigmas[:-1, None], guidance, conditioning.pooled)

    def plan(self, num_img: int, step: int, pe: Rope) -> PassPlan:
        """What the pieces of a step's pass share; with several processes, the pieces of own tokens."""
        if isinstance(self.model, ParallelFlux):
            return self.model.plan(num_img, self.txt.shape[1], self.table[step], pe, self.txt_lengths)
        return self.model.plan(num_img, self.table[step], pe, self.txt_lengths)

    def own(self, latents: Tensor, plan: PassPlan) -> tuple[Tensor, Tensor]:
        """The tokens of the latents and of the text that are here: all, unless several processes share them."""
        exchange = plan.attention.exchange
        return (latents, self.txt) if exchange is None else exchange.own(latents, self.txt)

    def velocity(self, latents: Tensor, step: int, pe: Rope) -> Tensor:
        return self.model.denoise(latents, self.txt, self.table[step], pe, self.txt_lengths)


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A batch made ready for all steps; nothing in here changes while they run.

    passes: the conditioned one, and the negative one with true CFG; latents: the initial noise [B, L, C] fp32;
    sigmas: N + 1 numbers on the host; dsigma: their differences [N] on the device.
    """

    model: DiT
    passes: list[PreparedPass]
    latents: Tensor
    pe: Rope
    sigmas: list[float]
    dsigma: Tensor
    true_cfg_scale: float
    height: int
    width: int

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What the DiT computes in."""
        return self.model.x_embedder.weight.dtype

    @cached_property
    def graph_key(self) -> Hashable:
        """What a graph is recorded for: shapes, numbers that are baked into kernels, and where which weights lie."""
        tensors = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        weights = hash(tuple((name, t.data_ptr(), t.shape, t.dtype) for name, t in tensors))
        lengths = tuple(prepared.txt.shape[1] for prepared in self.passes)
        scale = self.true_cfg_scale if len(self.passes) > 1 else None
        return self.height, self.width, len(self.latents), lengths, scale, self.model.attention_backend, weights


class Predictor(Protocol):
    """Gives the velocities of a step, one [B, L, C] a pass, and says afterwards what it left out."""

    def __call__(self, latents: Tensor, step: int) -> list[Tensor]: ...

    def reports(self) -> list[StepCacheReport | None]: ...


class AllBlocks:
    """The predictor that leaves nothing out."""

    def __init__(self, batch: PreparedBatch):
        self.batch = batch

    def __call__(self, latents: Tensor, step: int) -> list[Tensor]:
        return [prepared.velocity(latents, step, self.batch.pe) for prepared in self.batch.passes]

    def reports(self) -> list[StepCacheReport | None]:
        return [None] * len(self.batch.latents)


class EagerSteps:
    """Takes steps one op after the other; `how` says why not as a graph."""

    def __init__(self, batch: PreparedBatch, predict: Predictor, why: str):
        self.batch, self.predict, self.latents = batch, predict, batch.latents
        self.how = f"eager: {why}"

    def step(self, step: int) -> Tensor:
        """The latents after step number `step`, from 0; [B, L, C] fp32."""
        batch = self.batch
        velocities = self.predict(self.latents.to(batch.dtype), step)
        dsigma = batch.dsigma[step : step + 1]
        self.latents = flow_step(
            self.latents, velocities[0], dsigma, *velocities[1:], true_cfg_scale=batch.true_cfg_scale
        )
        return self.latents

    def reports(self) -> list[StepCacheReport | None]:
        return self.predict.reports()
