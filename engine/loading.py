"""Loads a model for an engine: which parts go to the device at once, which wait in host memory, which are quantized."""

from collections.abc import Sequence
from typing import Any

import torch

from uniworld.checkpoint.load import TINY, load_uniworld
from uniworld.checkpoint.precision import checked_dtype, default_device, default_dtype
from uniworld.engine.offload import check_offload, host_parts, reaches
from uniworld.engine.quantize import check_quantize, quantized_copy
from uniworld.engine.step_errors import StepErrors
from uniworld.models.unified import UniWorld


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
    **load: Any,
) -> tuple[UniWorld, StepErrors | None]:
    """`load_uniworld`, with the DiT quantized where asked; gives the measure of the steps' errors where asked.

    Weights that are quantized or offloaded are left in host memory, from where `offload.place` takes them.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = checked_dtype(dtype or default_dtype(device, tiny=model == TINY))
    check_offload(offload)
    check_quantize(quantize, device, dtype, quantize_exclude)
    in_host = {*host_parts(offload), *(["denoiser"] if quantize else [])}
    loaded = load_uniworld(model, device=device, dtype=dtype, progress=progress, in_host=in_host, **load)
    if quantize is None:
        return loaded, StepErrors(loaded.denoiser) if report_error else None
    exact = loaded.denoiser
    home = torch.device("cpu") if reaches(offload, "cpu") else device
    loaded.denoiser = quantized_copy(
        exact, quantize, exclude=quantize_exclude, compute=device, home=home, progress=progress
    )
    return loaded, StepErrors.of_quantized(exact, device) if report_error else None
