"""The step loop: from noise to packed latents."""

import torch
from torch import Tensor

from uniworld.engine.graphs import GraphSteps, StepGraphs
from uniworld.engine.parallel import ParallelFlux
from uniworld.engine.request import Job, Request, StepInfo
from uniworld.engine.step_cache import predictor
from uniworld.engine.step_errors import MeasuredSteps, StepErrors
from uniworld.engine.steps import DiT, EagerSteps, PreparedBatch, PreparedPass
from uniworld.models import flow
from uniworld.models.conditioning import Conditioning


class Denoiser:
    """Runs batches of jobs of equal shape through the DiT. Latents stay fp32 between steps."""

    def __init__(
        self,
        model: DiT,
        shift: dict[str, float] | None = None,
        graphs: StepGraphs | None = None,
        errors: StepErrors | None = None,
    ):
        """errors: where they are asked for; if of every step, `graphs` must be forbidden."""
        self.model = model
        self.shift = shift or {}
        self.graphs = StepGraphs() if graphs is None else graphs
        self.errors = errors

    @torch.inference_mode()
    def run(self, batch: list[Job]) -> None:
        """Fill the denoiser's fields of every job; mark those cancelled whose `on_step` said so."""
        prepared = self._prepare(batch)
        steps = self._choose(prepared, batch)
        latents = self._loop(batch, prepared, steps)
        for i, (job, report) in enumerate(zip(batch, steps.reports())):
            job.latents, job.graphs, job.step_cache = latents[i : i + 1], steps.how, report

    def check(self, request: Request, height: int, width: int) -> None:
        """Raise a ValueError unless the request can be drawn here at this size (of its `latents`: the packed shape)."""
        latents = request.latents
        shape = (1, (height // flow.TOKEN_PX) * (width // flow.TOKEN_PX), self.model.config.in_channels)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, must be {shape} (packed) for this size")

    def _choose(self, prepared: PreparedBatch, batch: list[Job]) -> EagerSteps | GraphSteps:
        """Whether steps are taken eagerly or as a graph is decided here and nowhere else."""
        request = batch[0].request
        why = self.graphs.why_eager(prepared, request.cache)
        if not why:
            return self.graphs.steps(prepared)
        predict = predictor(prepared, request)
        if self.errors is not None and (self.errors.every_step or request.cache is not None):
            predict = MeasuredSteps(predict, self.errors, prepared, [job.step_errors for job in batch])
        return EagerSteps(prepared, predict, why)

    def _loop(self, batch: list[Job], prepared: PreparedBatch, steps: EagerSteps | GraphSteps) -> Tensor:
        """All steps. The host never waits for the device in here, unless an `on_step` or a first-block cache does."""
        for step in range(prepared.num_steps):
            latents = steps.step(step)
            report_step(batch, step, prepared.sigmas[step + 1], latents)
            if isinstance(self.model, ParallelFlux):
                self.model.agree_on_cancelled(batch)
            if all(job.cancelled for job in batch):
                break
        return latents

    def _prepare(self, batch: list[Job]) -> PreparedBatch:
        first, device = batch[0], self.model.x_embedder.weight.device
        latents = torch.cat([self._initial_latents(job) for job in batch]).to(device)
        sigmas = flow.sigmas(first.request.num_inference_steps, latents.shape[1], **self.shift)
        return PreparedBatch(
            model=self.model,
            passes=self._passes(batch, sigmas.to(device)),
            latents=latents,
            pe=self.model.rope(flow.image_ids(first.height, first.width, device)),
            sigmas=sigmas.tolist(),
            dsigma=sigmas.diff().to(device),
            true_cfg_scale=first.request.true_cfg_scale,
            height=first.height,
            width=first.width,
        )

    def _initial_latents(self, job: Job) -> Tensor:
        if job.request.latents is not None:
            return job.request.latents.to("cpu", torch.float32)
        return flow.initial_noise(job.seed, job.height, job.width, self.model.config.in_channels // 4)

    def _passes(self, batch: list[Job], sigmas: Tensor) -> list[PreparedPass]:
        """The conditioned pass, and the negative one where true CFG is on."""
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.tensor([job.request.guidance_scale for job in batch], device=sigmas.device)
        conditionings = [Conditioning.stack([job.conditioning for job in batch])]
        if batch[0].negative is not None:
            conditionings.append(Conditioning.stack([job.negative for job in batch]))
        return [PreparedPass(self.model, c, sigmas, guidance) for c in conditionings]


def report_step(batch: list[Job], step: int, sigma: float, latents: Tensor) -> None:
    """Call every job's `on_step`; a callback that returns False cancels its job alone."""
    for i, job in enumerate(batch):
        if job.request.on_step is None or job.cancelled:
            continue
        info = StepInfo(step + 1, job.request.num_inference_steps, sigma, latents[i : i + 1])
        if job.request.on_step(info) is False:
            job.cancelled = True
