"""How far each step's velocity is off, against the whole DiT unquantized, on the same inputs.

Letters: B batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from uniworld.engine.offload import weights_of
from uniworld.engine.request import StepCacheReport
from uniworld.engine.steps import DiT, Predictor, PreparedBatch
from uniworld.models.blocks import Rope
from uniworld.models.flux import FluxTransformer


class StepErrors:
    """Compares the velocity of each step with that of the exact DiT on the same latents, text and modulation."""

    def __init__(self, exact: DiT, *, every_step: bool = False):
        """every_step: steps without a step cache are off too, as those of a quantized DiT are."""
        self.exact, self.every_step = exact, every_step

    @classmethod
    def of_quantized(cls, exact: FluxTransformer, device: torch.device) -> "StepErrors":
        """Against `exact`, what a quantized DiT was made of: its weights come to `device`, but those of the modulation.

        The table of modulations is made by the DiT that draws.
        """
        for weight in weights_of([exact], without=exact.modulation_linears()):
            weight.put(weight.value.to(device))
        return cls(exact, every_step=True)

    def measure(
        self, velocity: Tensor, latents: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, lengths: tuple | None
    ) -> Tensor:
        """||v - v_exact|| / ||v_exact|| of every sample, [B] fp32; the arguments of `FluxTransformer.denoise`."""
        truth = self.exact.denoise(latents, txt, modulation, pe, lengths).float().flatten(1)
        return (velocity.float().flatten(1) - truth).norm(dim=1) / truth.norm(dim=1)


class MeasuredSteps:
    """A predictor whose conditioned velocity is measured in every step."""

    def __init__(
        self, predict: Predictor, errors: StepErrors, batch: PreparedBatch, step_errors: Sequence[list[Tensor]]
    ):
        """step_errors: of each job, where the errors of its steps are put."""
        self.predict, self.errors, self.batch, self.step_errors = predict, errors, batch, step_errors

    def __call__(self, latents: Tensor, step: int) -> list[Tensor]:
        velocities, prepared = self.predict(latents, step), self.batch.passes[0]
        row, pe, lengths = prepared.table[step], self.batch.pe, prepared.txt_lengths
        measured = self.errors.measure(velocities[0], latents, prepared.txt, row, pe, lengths)
        for of_job, error in zip(self.step_errors, measured):
            of_job.append(error)
        return velocities

    def reports(self) -> list[StepCacheReport | None]:
        return self.predict.reports()
