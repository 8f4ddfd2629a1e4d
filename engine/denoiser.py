"""The step loop: from noise to packed latents."""

import torch
from torch import Tensor

from uniworld.engine.request import Job, StepInfo
from uniworld.kernels.flow_step import flow_step
from uniworld.models import flow
from uniworld.models.blocks import Rope
from uniworld.models.conditioning import Conditioning
from uniworld.models.flux import FluxTransformer


class PreparedPass:
    """One conditioning made ready for all steps: projected text and the modulation of every step in one table."""

    def __init__(self, model: FluxTransformer, conditioning: Conditioning, sigmas: Tensor, guidance: Tensor | None):
        self.model = model
        self.txt = model.embed_txt(conditioning.txt)
        self.txt_lengths = conditioning.lengths_if_padded
        self.table = model.modulation(sigmas[:-1, None], guidance, conditioning.pooled)

    def velocity(self, latents: Tensor, step: int, pe: Rope) -> Tensor:
        return self.model.denoise(latents, self.txt, self.table[step], pe, self.txt_lengths)


class Denoiser:
    """Runs batches of jobs of equal shape through the DiT. Latents stay fp32 between steps."""

    def __init__(self, model: FluxTransformer, shift: dict[str, float] | None = None):
        self.model = model
        self.shift = shift or {}

    @torch.inference_mode()
    def run(self, batch: list[Job]) -> None:
        """Fill `latents` of every job, or mark it cancelled where its `on_step` returned False."""
        first, device = batch[0], self.model.x_embedder.weight.device
        pe = self.model.rope(flow.image_ids(first.height, first.width, device))
        latents = torch.cat([self._initial_latents(job) for job in batch]).to(device)
        sigmas = flow.sigmas(first.request.num_inference_steps, latents.shape[1], **self.shift)
        dsigma = sigmas.diff().to(device)
        passes = self._prepare(batch, sigmas.to(device))

        dtype = self.model.x_embedder.weight.dtype
        for step in range(first.request.num_inference_steps):
            velocities = [p.velocity(latents.to(dtype), step, pe) for p in passes]
            scale = first.request.true_cfg_scale
            latents = flow_step(latents, velocities[0], dsigma[step : step + 1], *velocities[1:], true_cfg_scale=scale)
            report_step(batch, step, float(sigmas[step + 1]), latents)
            if all(job.cancelled for job in batch):
                break
        for i, job in enumerate(batch):
            job.latents = latents[i : i + 1]

    def check_latents(self, latents: Tensor | None, height: int, width: int) -> None:
        """Raise a ValueError unless `latents` is None or has the packed shape of a picture of this size."""
        shape = (1, (height // flow.TOKEN_PX) * (width // flow.TOKEN_PX), self.model.config.in_channels)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)}, must be {shape} (packed) for this size")

    def _initial_latents(self, job: Job) -> Tensor:
        if job.request.latents is not None:
            return job.request.latents.to("cpu", torch.float32)
        return flow.initial_noise(job.seed, job.height, job.width, self.model.config.in_channels // 4)

    def _prepare(self, batch: list[Job], sigmas: Tensor) -> list[PreparedPass]:
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
