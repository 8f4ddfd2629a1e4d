"""Key tables between the authors' checkpoint layout and the names of our modules.

Authors (transformers 4 names, diffusers FLUX names)        ours
`visual.*`                                                  vlm `model.visual.*`
`model.*`                                                   vlm `model.language_model.*`
`lm_head.*`                                                 vlm `lm_head.*`
`denoise_tower.denoiser.*`                                  denoiser, q, k, v fused by rows
`denoise_tower.{denoise,siglip,vae}_projector.*`            the connectors, unchanged
`denoise_tower.queries.weight`                              learned queries; the authors have none

A name of ours with fused rows stands for three of theirs, in the order q, k, v.
"""

import re
from typing import NamedTuple

VLM = "vlm"
DENOISER = "denoiser"
CONNECTORS = ("denoise_projector", "siglip_projector", "vae_projector")

QUERIES = "queries"
TOWER_PARTS = (*CONNECTORS, QUERIES)

DENOISER_PREFIX = "denoise_tower.denoiser."
TOWER_PREFIX = "denoise_tower."

# Longest prefix first on our side: `model.visual.` must not be taken for `model.`.
VLM_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."), ("lm_head.", "lm_head."))

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_SOURCE = {source: (fused, row) for fused, sources in FUSED.items() for row, source in enumerate(sources)}
_FUSED_NAME = re.compile(rf"^(.*\.attn\.)({'|'.join(FUSED)})\.(weight|bias)$")
_SOURCE_NAME = re.compile(rf"^(.*\.attn\.)({'|'.join(_SOURCE)})\.(weight|bias)$")


class Place(NamedTuple):
    """Where a tensor of the authors' checkpoint goes: block `row` of `rows` equal blocks of parameter `name`."""

    part: str
    name: str
    row: int = 0
    rows: int = 1


def split_diffusers(name: str) -> Place:
    """A parameter name of diffusers' `FluxTransformer2DModel` -> its place in ours."""
    match = _SOURCE_NAME.match(name)
    if match is None:
        return Place(DENOISER, name)
    fused, row = _SOURCE[match[2]]
    return Place(DENOISER, f"{match[1]}{fused}.{match[3]}", row, len(FUSED[fused]))


def diffusers_names(name: str) -> tuple[str, ...]:
    """The inverse of `split_diffusers`: the one or three diffusers names of a parameter of ours."""
    match = _FUSED_NAME.match(name)
    if match is None:
        return (name,)
    return tuple(f"{match[1]}{source}.{match[3]}" for source in FUSED[match[2]])


def place(key: str) -> Place | None:
    """The place of a key of the authors' checkpoint; None where the layout has no such family of keys."""
    if key.startswith(DENOISER_PREFIX):
        return split_diffusers(key.removeprefix(DENOISER_PREFIX))
    for part in TOWER_PARTS:
        if key.startswith(f"{TOWER_PREFIX}{part}."):
            return Place(part, key.removeprefix(f"{TOWER_PREFIX}{part}."))
    for theirs, ours in VLM_PREFIXES:
        if key.startswith(theirs):
            return Place(VLM, ours + key.removeprefix(theirs))
    return None


def authors_names(part: str, name: str) -> tuple[str, ...]:
    """The inverse of `place`: the one or three keys that a parameter of ours has in the authors' checkpoint."""
    if part == DENOISER:
        return tuple(DENOISER_PREFIX + n for n in diffusers_names(name))
    if part in TOWER_PARTS:
        return (f"{TOWER_PREFIX}{part}.{name}",)
    if part == VLM:
        for theirs, ours in VLM_PREFIXES:
            if name.startswith(ours):
                return (theirs + name.removeprefix(ours),)
    raise KeyError(f"{part}.{name} has no name in the authors' layout")


def qwen_to_authors(key: str) -> str:
    """A key of a Qwen2.5-VL folder -> the authors' key; folders saved by transformers 5 carry its newer names."""
    for theirs, ours in VLM_PREFIXES:
        if ours != theirs and key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key
