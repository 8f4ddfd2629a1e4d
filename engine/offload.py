"""Weights that wait in host memory and come to the device for the moment they are used. Results keep their bits.

Three levels, each with what the one before it does:

    modulation   the linears that make the modulation table come one by one, while the table of a request is built
    parts        VLM, each encoder, connectors and VAE come while they run, never two of them
    cpu          the DiT's blocks come one by one in every step
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uniworld.checkpoint.weights import move_buffers
from uniworld.models.flux import FluxTransformer
from uniworld.models.unified import UniWorld

LEVELS = ("modulation", "parts", "cpu")
# What is on the device together, besides the DiT; parts as `UniWorld` names them.
GROUPS = {
    "vlm": ("vlm", "queries"),
    "semantic_encoder": ("semantic_encoder",),
    "text_encoders": ("text_encoders",),
    "connectors": ("denoise_projector", "siglip_projector", "vae_projector"),
    "denoise": (),
    "decode": ("vae",),
}
MOVING = tuple(part for parts in GROUPS.values() for part in parts)
NUM_SLOTS = 2  # one holds the module that runs, the next one arrives in the other
ALIGNMENT = 256  # bytes: as the device's allocator places a tensor of its own


def check_offload(level: str | None, *others: str) -> None:
    """Raise a ValueError unless `level` is None, one of `LEVELS` or one of `others`."""
    if level is not None and level not in (*others, *LEVELS):
        raise ValueError(f"offload={level!r}: must be one of {', '.join((*others, *LEVELS))}, or None")


def reaches(level: str | None, wanted: str) -> bool:
    """Whether `level` does what `wanted` does."""
    return level is not None and LEVELS.index(level) >= LEVELS.index(wanted)


def host_parts(level: str | None) -> tuple[str, ...]:
    """The parts, as `UniWorld` names them, that are loaded into host memory at this level."""
    if level is None:
        return ()
    return ("denoiser", *MOVING) if reaches(level, "parts") else ("denoiser",)


@dataclass
class Weight:
    """One parameter: its value, and every (module, attribute) that reaches it."""

    value: Tensor
    places: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Let `value` stand in all places; what stood there stays as it is."""
        parameter = nn.Parameter(value, requires_grad=False)
        for owner, attribute in self.places:
            owner._parameters[attribute] = parameter


def weights_of(modules: Sequence[nn.Module], without: Collection[nn.Module] = ()) -> list[Weight]:
    """Every parameter inside, tied ones once, but those that a module of `without` holds."""
    found: dict[int, Weight] = {}
    for owner in (owner for module in modules for owner in module.modules() if owner not in without):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                weight = found.setdefault(id(parameter), Weight(parameter.detach()))
                weight.places.append((owner, attribute))
    return list(found.values())


class Turns(NamedTuple):
    """Modules whose weights, but those of `without`, take turns on the device, in the order in which a pass runs."""

    modules: list[nn.Module]
    without: list[nn.Module]

    def weights(self, i: int) -> list[Weight]:
        return weights_of([self.modules[i]], self.without)


def turns_of(denoiser: FluxTransformer, level: str | None) -> list[Turns]:
    """What of the DiT is streamed at this level."""
    if level is None:
        return []
    modulation = denoiser.modulation_linears()
    turns = [Turns(modulation, [])]
    if reaches(level, "cpu"):
        for blocks in (denoiser.transformer_blocks, denoiser.single_transformer_blocks):
            turns.append(Turns(list(blocks), modulation))
    return turns


class Stream:
    """The weights of modules that take turns, in two slots on the device.

    Before a module runs its weights are fetched, where that was not done yet, and those of the next one are begun; on a
    GPU from pinned memory and on a stream of their own, so that they arrive while the module computes.
    """

    def __init__(self, turns: Turns, device: torch.device):
        self.device = device
        self.slots = [torch.empty(slot_bytes(turns), dtype=torch.uint8, device=device) for _ in slots_of(turns)]
        self._held: list[int | None] = [None] * len(self.slots)
        self._host = []
        for i, module in enumerate(turns.modules):  # one after the other: the weights never stand in memory twice
            weights = turns.weights(i)
            self._host.append(packed(weights, pinned=device.type == "cuda"))
            for weight, offset in zip(weights, offsets(weights)):
                weight.put(view_as(self.slots[i % NUM_SLOTS], offset, weight.value))
            module.register_forward_pre_hook(partial(self._before, i))
            module.register_forward_hook(partial(self._after, i), always_call=True)
        self._copies = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)
            self._arrived = [torch.cuda.Event() for _ in self.slots]
            self._used = [torch.cuda.Event() for _ in self.slots]
            torch.cuda.synchronize(device)  # the slots' memory may have been in use before

    def _before(self, i: int, *_) -> None:
        self._fetch(i)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[i % NUM_SLOTS])
        following = (i + 1) % len(self._host)
        if following % NUM_SLOTS != i % NUM_SLOTS:
            self._fetch(following)

    def _after(self, i: int, *_) -> None:
        if self._copies is not None:
            self._used[i % NUM_SLOTS].record(torch.cuda.current_stream(self.device))
        self._fetch((i + 1) % len(self._host))  # where it takes this module's own slot: the end of an odd sequence

    def _fetch(self, i: int) -> None:
        """Bring the weights of module i into its slot, once what ran on the slot's last ones is done."""
        slot = i % NUM_SLOTS
        if self._held[slot] == i:
            return
        self._held[slot] = i
        host = self._host[i]
        target = self.slots[slot][: host.nbytes]
        if self._copies is None:
            target.copy_(host)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used[slot])
            target.copy_(host, non_blocking=True)
            self._arrived[slot].record(self._copies)


def offsets(weights: Sequence[Weight]) -> list[int]:
    """The byte at which each weight begins, and the number of bytes of all."""
    starts = [0]
    for weight in weights:
        starts.append(-(-(starts[-1] + weight.value.nbytes) // ALIGNMENT) * ALIGNMENT)
    return starts


def packed(weights: Sequence[Weight], pinned: bool) -> Tensor:
    """Copies of the values one after the other, in bytes of host memory."""
    *starts, num_bytes = offsets(weights)
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    for weight, start in zip(weights, starts):
        if not weight.value.is_meta:
            view_as(host, start, weight.value).copy_(weight.value)
    return host


def view_as(data: Tensor, start: int, like: Tensor) -> Tensor:
    """The bytes of `data` from `start` on, with the type and shape of `like`."""
    return data[start : start + like.nbytes].view(like.dtype).view(like.shape)


class Parts:
    """Brings the weights of a group of parts to the device, and takes those of the group before it away.

    The values stay in host memory all the time: taking away is forgetting the copies on the device.
    """

    def __init__(self, model: UniWorld):
        self.device = model.device
        self._weights = {group: weights_of(modules_of(model, parts)) for group, parts in GROUPS.items()}
        self._here = "denoise"
        for weight in (weight for weights in self._weights.values() for weight in weights):
            if weight.value.is_cuda:  # of a model that was loaded to the device
                weight.value = weight.value.cpu()
                weight.put(weight.value)
        for part in modules_of(model, MOVING):
            move_buffers(part, model.device)

    def bring(self, group: str) -> None:
        """`group`: a key of `GROUPS`; "denoise" leaves the device to the DiT."""
        if group == self._here:
            return
        for weight in self._weights[self._here]:
            weight.put(weight.value)
        for weight in self._weights[group]:
            weight.put(weight.value.to(self.device))
        self._here = group


def modules_of(model: UniWorld, parts: Sequence[str]) -> list[nn.Module]:
    """The parts that this model has."""
    return [module for part in parts if (module := getattr(model, part)) is not None]


def place(model: UniWorld, level: str | None) -> Parts | None:
    """Put every weight where it belongs at this level; gives what moves whole parts, where they move.

    Raises: ValueError for an unknown level.
    """
    check_offload(level)
    turns = turns_of(model.denoiser, level)
    for weight in resident_weights(model.denoiser, turns):
        if weight.value.device.type != model.device.type:
            weight.put(weight.value.to(model.device))
    for each in turns:
        Stream(each, model.device)
    return Parts(model) if reaches(level, "parts") else None


def resident_weights(denoiser: FluxTransformer, turns: Sequence[Turns]) -> list[Weight]:
    """The weights of the DiT that are not streamed."""
    return weights_of([denoiser], without=streamed_modules(turns))


def streamed_modules(turns: Sequence[Turns]) -> set[nn.Module]:
    """The modules that hold the weights that take turns: linears, and the scales of norms."""
    weights = [weight for each in turns for i in range(len(each.modules)) for weight in each.weights(i)]
    return {owner for weight in weights for owner, _ in weight.places}


def slots_of(turns: Turns) -> range:
    return range(min(NUM_SLOTS, len(turns.modules)))


def slot_bytes(turns: Turns) -> int:
    """Bytes of the largest module that takes turns."""
    return max(offsets(turns.weights(i))[-1] for i in range(len(turns.modules)))


def weight_bytes(model: UniWorld, level: str | None) -> dict[str, int]:
    """Bytes of weights on the device while each of `GROUPS` is there, and under "host" of those that wait.

    Counted from shapes: the model may be on meta, and may have been placed already or not. Activations, the caches of
    libraries and of the allocator, and the DiT's copy for `report_error` come on top.
    """
    turns = turns_of(model.denoiser, level)
    always = sum(slot_bytes(each) * len(slots_of(each)) for each in turns)
    always += num_bytes(resident_weights(model.denoiser, turns))
    always += num_bytes(weights_of([model.task_head] if model.task_head else []))
    groups = {group: num_bytes(weights_of(modules_of(model, parts))) for group, parts in GROUPS.items()}
    waiting = sum(offsets(each.weights(i))[-1] for each in turns for i in range(len(each.modules)))
    moving = sum(groups.values())
    if reaches(level, "parts"):
        return {group: always + size for group, size in groups.items()} | {"host": waiting + moving}
    return dict.fromkeys(GROUPS, always + moving) | {"host": waiting}


def num_bytes(weights: Sequence[Weight]) -> int:
    return sum(weight.value.nbytes for weight in weights)
