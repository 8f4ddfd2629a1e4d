"""Chooses how much waits in host memory from the memory that is free: the lightest level that fits, by arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uniworld.engine.offload import GROUPS, LEVELS, num_bytes, weight_bytes, weights_of
from uniworld.engine.quantize import quantized_copy
from uniworld.models.unified import UniWorld

AUTO = "auto"
GIB = 2**30
# For what comes on top of weights: decoding a picture of 1024 px takes 1.5 GiB, a step 0.4; the rest is for libraries'
# workspaces, the cache of a text answer and what the allocator keeps.
RESERVE = 3 * GIB


@dataclass(frozen=True)
class OffloadChoice:
    """The level of offloading, as `engine.offload` names them, and why it was chosen where nobody asked for it."""

    level: str | None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.level or 'none'}: {self.why}" if self.why else self.level or "none"


def choose_offload(
    model: UniWorld,
    *,
    quantize: str | None = None,
    quantize_exclude: Sequence[str] = (),
    report_error: bool = False,
) -> OffloadChoice:
    """The first of none, "modulation", "parts" and "cpu" whose largest sum of weights leaves `RESERVE` free.

    Args:
        model: before it is filled, its parameters on meta and of the dtype that they will have.
        quantize, quantize_exclude, report_error: what becomes of the DiT, as for `Engine.from_pretrained`.
    """
    free = free_bytes(model.device)
    if free is None:
        return OffloadChoice(None, f"{model.device} has no memory of its own to spare")
    exact, beside = model.denoiser, RESERVE
    if quantize is not None:
        model.denoiser = quantized_copy(exact, quantize, exclude=quantize_exclude)
        if report_error:
            beside += num_bytes(weights_of([exact], without=exact.modulation_linears()))
    try:
        needs = {level: largest(weight_bytes(model, level)) for level in (None, *LEVELS)}
    finally:
        model.denoiser = exact
    fitting = (level for level, need in needs.items() if need + beside <= free)
    level = next(fitting, LEVELS[-1])
    sizes = f"{needs[level] / GIB:.2f} GiB of weights and {beside / GIB:.2f} beside them"
    if needs[level] + beside > free:
        return OffloadChoice(level, f"nothing needs less, but {sizes} are more than the {free / GIB:.2f} that are free")
    more = [f"{other or 'none'} needs {needs[other] / GIB:.2f}" for other in list(needs)[: list(needs).index(level)]]
    return OffloadChoice(level, "; ".join([f"{sizes} fit the {free / GIB:.2f} that are free", *more]))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a GPU, what torch keeps unused included; None on any other device."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def largest(sizes: dict[str, int]) -> int:
    """The most that is on the device at once, of `weight_bytes`."""
    return max(sizes[group] for group in GROUPS)
