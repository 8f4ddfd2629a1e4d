"""Loads a model for an engine: which parts go to the device at once, which wait in host memory, which are quantized."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from uniworld.checkpoint.load import TINY, load_uniworld
from uniworld.checkpoint.precision import checked_dtype, default_device, default_dtype
from uniworld.engine.cache import ConditioningCache
from uniworld.engine.conditioner import Conditioner
from uniworld.engine.offload import check_offload, host_parts, reaches
from uniworld.engine.offload_choice import AUTO, OffloadChoice, choose_offload
from uniworld.engine.quantize import check_quantize, quantized_copy
from uniworld.engine.request import Request
from uniworld.engine.step_errors import StepErrors
from uniworld.models.unified import UniWorld


class Loaded(NamedTuple):
    """A model, the measure of its steps' errors where asked for, how much of it is to wait in host memory, and what
    has been encoded already."""

    model: UniWorld
    errors: StepErrors | None
    offload: OffloadChoice
    conditionings: ConditioningCache


def load_for_engine(
    model: str,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quantize: str | None,
    quantize_exclude: Sequence[str],
    offload: str | None,
    report_error: bool,
    progress: bool,
    first_request: Request | None,
    **load: Any,
) -> Loaded:
    """`load_uniworld`, with the DiT quantized where asked; offload "auto" is decided once the shapes are known.

    Weights that are quantized or offloaded are left in host memory, from where `offload.place` takes them. The first
    request is encoded while the DiT is read.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = checked_dtype(dtype or default_dtype(device, tiny=model == TINY))
    check_offload(offload, AUTO)
    check_quantize(quantize, device, dtype, quantize_exclude)
    choice, conditionings = OffloadChoice(offload), ConditioningCache()

    def in_host(made: UniWorld) -> set[str]:
        nonlocal choice
        if first_request is not None:  # what is wrong with it is said before a weight is read
            Conditioner(made).check(first_request)
        if offload == AUTO:
            settings = {"quantize_exclude": quantize_exclude, "report_error": report_error}
            choice = choose_offload(made, quantize=quantize, **settings)
        return {*host_parts(choice.level), *(["denoiser"] if quantize else [])}

    def encode(made: UniWorld) -> None:
        # Encoders that wait in host memory come only when all is loaded, and the VAE gets its layout then.
        if not reaches(choice.level, "parts") and made.references != "vae":
            Conditioner(made, conditionings).prepare(first_request)

    where = {"device": device, "dtype": dtype, "in_host": in_host}
    meanwhile = None if first_request is None else encode
    loaded = load_uniworld(model, progress=progress, meanwhile=meanwhile, **where, **load)
    if offload == AUTO and progress:
        print(f"offload {choice}", file=sys.stderr)
    if quantize is None:
        return Loaded(loaded, StepErrors(loaded.denoiser) if report_error else None, choice, conditionings)
    exact = loaded.denoiser
    home = torch.device("cpu") if reaches(choice.level, "cpu") else device
    loaded.denoiser = quantized_copy(
        exact, quantize, exclude=quantize_exclude, compute=device, home=home, progress=progress
    )
    return Loaded(loaded, StepErrors.of_quantized(exact, device) if report_error else None, choice, conditionings)
