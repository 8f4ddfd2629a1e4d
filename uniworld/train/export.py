"""From a training checkpoint to a model: the authors' layout, with the trained weights in place of the base's.

Nothing is computed and no rank is started: tensors stream from the base's files, and the trained ones are put together
from the slices of however many ranks saved them.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from uniworld.checkpoint import locate
from uniworld.checkpoint.connector_files import EXPORTS, read_connectors, write_connector
from uniworld.checkpoint.load import TINY
from uniworld.checkpoint.names import QUERIES, TOWER_PREFIX, authors_names
from uniworld.checkpoint.progress import byte_progress
from uniworld.checkpoint.save import (
    MAX_SHARD_BYTES,
    TASK_HEAD_FILE,
    ShardWriter,
    atomic_folder,
    copy_side_files,
    write_json,
)
from uniworld.checkpoint.tiny import tiny_dir
from uniworld.checkpoint.weights import Header, open_weights, read_headers
from uniworld.config import TrainConfig, load_config
from uniworld.models.references import REFERENCES
from uniworld.train.checkpoints import CONFIG, open_checkpoint
from uniworld.train.lora import authors_deltas, diffusers_adapter, is_factor
from uniworld.train.saved import TrainedWeights
from uniworld.train.stages import references_of

PART_FOLDERS = ("flux", "siglip")
QUERIES_KEY = f"{TOWER_PREFIX}{QUERIES}.weight"
LORA_FILE = "lora.safetensors"  # the factors alone, as diffusers loads them


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    names: tuple[str, ...]
    """The trained parameters."""
    parts: dict[str, str]
    """Of FLUX and SigLIP, what must be named when loading because it does not lie in the folder."""


def export(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    ema: bool = False,
    connectors_only: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> Exported:
    """Write the model of a checkpoint; the folder appears under its name only when it is complete.

    Trained connectors also stand alone, as `denoise_projector.bin` and `.safetensors` in fp32 under the authors' keys.
    FLUX's and SigLIP's folders come along (as links to the same files where the disk allows) if they lie in the base's.

    Args:
        checkpoint: a checkpoint's folder, or a run's for its newest complete one.
        folder: to make.
        ema: the averaged weights.
        connectors_only: no model, the trained connectors alone.
        overwrite: replace an existing folder.

    Raises:
        ValueError: the checkpoint is not complete, has no EMA, or does not fit the base; `folder` exists.
        FileNotFoundError: the checkpoint or the base is not there.
    """
    saved = open_checkpoint(checkpoint, "checkpoint")
    config = load_config(saved.folder / CONFIG)
    weights = TrainedWeights(saved, ema=ema)
    trained = trained_keys(weights)
    connectors = [part for part in EXPORTS if f"{part}.0.weight" in weights.shapes]
    if connectors_only and not connectors:
        raise ValueError("connectors_only: the checkpoint trained no connector")
    with atomic_folder(Path(folder), overwrite=overwrite) as temporary:
        if not connectors_only:
            deltas = authors_deltas(weights.shapes, weights)
            _write_model(temporary, config, trained, deltas, max_shard_bytes, progress)
            if deltas:
                save_file(diffusers_adapter(weights.shapes, weights), temporary / LORA_FILE)
        for part in connectors:
            prefix = f"{part}."
            names = [name for name in weights.shapes if name.startswith(prefix)]
            write_connector(temporary, part, {name.removeprefix(prefix): weights[name] for name in names})
    parts = {} if connectors_only else _parts_elsewhere(config, Path(folder))
    return Exported(Path(folder), saved.step, tuple(weights.shapes), parts)


def trained_keys(weights: TrainedWeights) -> dict[str, Callable[[], Tensor]]:
    """For each key of the authors' layout that was trained, what reads it; fused q, k, v come apart by rows."""

    def reader(name: str, row: int, rows: int) -> Callable[[], Tensor]:
        return lambda: weights[name].chunk(rows)[row]

    readers = {}
    for name in filterfalse(is_factor, weights.shapes):
        part, _, rest = name.partition(".")
        keys = authors_names(part, rest)
        readers |= {key: reader(name, row, len(keys)) for row, key in enumerate(keys)}
    return readers


def base_folder(config: TrainConfig) -> Path:
    """The local folder of the model that the run started from."""
    path = config.model.path
    return tiny_dir() if path == TINY else locate.resolve_folder("model.path", path, locate.MODEL_PATTERNS)


def _write_model(
    folder: Path,
    config: TrainConfig,
    trained: dict[str, Callable[[], Tensor]],
    deltas: dict[str, Callable[[], Tensor]],
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """The base's tensors with the trained ones in their place, and LoRA products added to what they belong to."""
    base = base_folder(config)
    headers = read_headers(locate.weight_files(base))
    replaced = _start_connectors(config) | trained
    if missing := sorted((replaced.keys() | deltas.keys()) - headers.keys() - {QUERIES_KEY}):
        raise ValueError(f"model.path={config.model.path}: has no {missing[0]}, which was trained")
    writer = ShardWriter(folder, max_shard_bytes)
    with byte_progress(f"Exporting {config.model.path}", sum(h.num_bytes for h in headers.values()), progress) as done:
        for header, tensor in _base_tensors(headers):
            if header.key in replaced:
                new = replaced[header.key]()
                if new.shape != tensor.shape:
                    wrong = f"shape {list(tensor.shape)}, the trained one {list(new.shape)}"
                    raise ValueError(f"model.path={config.model.path}: {header.key} has {wrong}")
                tensor = new.to(tensor.dtype)
            if header.key in deltas:
                tensor = (tensor.float() + deltas[header.key]()).to(tensor.dtype)
            writer.add(header.key, tensor)
            done(header.num_bytes)
        for key in replaced.keys() - headers.keys():  # queries that the base did not have
            writer.add(key, replaced[key]().to(tensor.dtype))
        writer.finish()
    write_json(folder / "config.json", _trained_config(locate.read_json(base / "config.json"), references_of(config)))
    copy_side_files(base, folder)
    if (base / TASK_HEAD_FILE).is_file():
        shutil.copyfile(base / TASK_HEAD_FILE, folder / TASK_HEAD_FILE)
    for part in PART_FOLDERS:
        if getattr(config.model, part) is None and (base / part).is_dir():
            shutil.copytree(base / part, folder / part, copy_function=_link_or_copy)


def _base_tensors(headers: dict[str, Header]) -> Iterator[tuple[Header, Tensor]]:
    """Every tensor of the base, file by file."""
    by_file: dict[Path, list[Header]] = {}
    for header in headers.values():
        by_file.setdefault(header.path, []).append(header)
    for path, found in by_file.items():
        with open_weights(path) as file:
            for header in found:
                yield header, file.get_tensor(header.key)


def _start_connectors(config: TrainConfig) -> dict[str, Callable[[], Tensor]]:
    """Connectors of an earlier stage that the run started from, which stand in place of the base's."""
    if config.model.connectors is None:
        return {}
    given = read_connectors(Path(config.model.connectors))
    return {key: lambda tensor=tensor: tensor for key, tensor in given.items()}


def _trained_config(config: dict[str, Any], references: str) -> dict[str, Any]:
    """The base's config.json; it no longer says that the weights are random, but what stood for reference pictures."""
    own = {key: value for key, value in config.get("uniworld", {}).items() if key != "references"}
    if "uniworld" in config:
        own["random_weights"] = False
    if references != REFERENCES[0]:
        own["references"] = references
    return {**config, "uniworld": own} if own else config


def _parts_elsewhere(config: TrainConfig, folder: Path) -> dict[str, str]:
    missing = [part for part in PART_FOLDERS if not (folder / part).is_dir()]
    return {part: getattr(config.model, part) for part in missing if getattr(config.model, part) is not None}


def _link_or_copy(source: str, target: str) -> None:
    """A second name of the same file, or a copy on another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
