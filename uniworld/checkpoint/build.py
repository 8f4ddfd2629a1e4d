"""Builds modules from config files, without memory for their parameters, and plans which tensor fills which."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniworld.checkpoint.locate import read_json, weight_files
from uniworld.checkpoint.names import CONNECTORS, DENOISER, QUERIES, TOWER_PREFIX, VLM, authors_names
from uniworld.checkpoint.weights import Header, Plan, module_targets, parameters_on_meta, read_headers
from uniworld.models.connectors import Connector
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.models.queries import LearnedQueries
from uniworld.models.vlm import VisionLanguageModel

ConnectorShape = tuple[int, int, int]  # in, hidden, out features
QueriesShape = tuple[int, int]  # how many, how wide
TowerShapes = Mapping[str, ConnectorShape | QueriesShape]

# transformers 4 put these before every name of an encoder that stands alone; 5 does not.
ENCODER_PREFIXES = ("text_model.", "vision_model.")


def denoiser_config(config: Mapping[str, Any], title: str | Path = "config.json") -> dict[str, Any]:
    """The DiT's part of a UniWorld config; other checkpoints have none."""
    found = config.get("denoise_tower", {}).get("denoiser_config")
    if not isinstance(found, dict):
        raise ValueError(
            f"{title}: config.json has no denoise_tower, so this is no UniWorld checkpoint; see `uniworld convert`"
        )
    return found


def build_univa(config: Mapping[str, Any], shapes: TowerShapes) -> dict[str, nn.Module]:
    """The parts that a UniWorld checkpoint holds, parameters on meta: vlm, denoiser and what `shapes` names."""
    try:
        with parameters_on_meta():
            return {VLM: VisionLanguageModel.from_config(dict(config))} | build_tower(config, shapes)
    except KeyError as error:
        raise ValueError(f"config.json: has no {error.args[0]}") from error


def build_tower(config: Mapping[str, Any], shapes: TowerShapes) -> dict[str, nn.Module]:
    """The denoiser, and the connectors and queries that `shapes` names, parameters on meta."""
    with parameters_on_meta():
        denoiser = FluxTransformer(FluxConfig.from_dict(denoiser_config(config)))
        kinds = {QUERIES: LearnedQueries}
        return {DENOISER: denoiser} | {name: kinds.get(name, Connector)(*shape) for name, shape in shapes.items()}


def checkpoint_module(part: str, module: nn.Module) -> nn.Module:
    """The module whose parameter names `checkpoint.names` knows: for the VLM transformers' own, inside the wrapper."""
    return module.model if part == VLM else module


def connector_shapes(headers: Mapping[str, Header], title: str) -> dict[str, ConnectorShape]:
    """The widths of the connectors that a checkpoint holds, from the headers of its tensors.

    Raises:
        ValueError: a connector is incomplete, or one of the two that every checkpoint has is missing.
    """
    shapes = {}
    for part in CONNECTORS:
        keys = [f"{TOWER_PREFIX}{part}.{layer}.weight" for layer in (0, 2)]
        found = [headers[key].shape for key in keys if key in headers]
        if not found and part == "vae_projector":
            continue
        if missing := [key for key in keys if key not in headers]:
            raise ValueError(f"{title}: {'; '.join(f'missing {key}' for key in missing)}")
        if any(len(shape) != 2 for shape in found):
            raise ValueError(f"{title}: {' or '.join(keys)} is not a matrix")
        (hidden, in_features), (out_features, _) = found
        shapes[part] = (in_features, hidden, out_features)
    return shapes


def tower_shapes(headers: Mapping[str, Header], title: str) -> dict[str, ConnectorShape | QueriesShape]:
    """The widths of a checkpoint's connectors and, where it has some, of its learned queries; errors as above."""
    shapes: dict[str, ConnectorShape | QueriesShape] = dict(connector_shapes(headers, title))
    key = f"{TOWER_PREFIX}{QUERIES}.weight"
    if key in headers:
        if len(headers[key].shape) != 2:
            raise ValueError(f"{title}: {key} is not a matrix")
        shapes[QUERIES] = headers[key].shape
    return shapes


def univa_plan(
    title: str | Path,
    headers: dict[str, Header],
    parts: Mapping[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """The plan that fills the parts of `build_univa` from tensors in the authors' layout."""
    targets = {}
    for part, module in parts.items():
        owner = checkpoint_module(part, module)
        targets |= module_targets(owner, lambda name, part=part: authors_names(part, name))
    return Plan(title, headers, targets, device, dtype)


def encoder_plan(
    folder: Path,
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    stem: str = "model",
    ignored: tuple[str, ...] = (),
) -> Plan:
    """The plan that fills a transformers or diffusers module from its own folder.

    Args:
        ignored: prefixes of keys in the file that this module does not use (a text tower, say).
    """
    headers = {
        without_prefix(key): header
        for key, header in read_headers(weight_files(folder, stem)).items()
        if not key.startswith(ignored) and not key.endswith("position_ids")  # a buffer in old files
    }
    targets = module_targets(module, lambda name: (without_prefix(name),))
    return Plan(folder, headers, targets, device, dtype)


def without_prefix(name: str) -> str:
    for prefix in ENCODER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")
