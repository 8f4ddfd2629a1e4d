"""Writes checkpoints in the authors' layout: sharded safetensors with an index, never half-written."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from uniworld.checkpoint.names import authors_names
from uniworld.models.references import REFERENCES
from uniworld.models.unified import FULL_ANCHOR_PX, UniWorld

MAX_SHARD_BYTES = 5_000_000_000
TASK_HEAD_FILE = "task_head_final.pt"

# What a checkpoint folder holds beside weights and config; copied along, by name.
SIDE_FILES = (
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, keep_existing: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends, and is removed when it fails.

    Args:
        target: the folder to make.
        overwrite: replace an existing folder (otherwise one that is not empty is refused at once).
        keep_existing: another process may make the same folder meanwhile: keep whichever came first.

    Raises:
        ValueError: `target` exists and is not empty, or its parent cannot be written to.
    """
    if target.exists() and not overwrite and not keep_existing and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"out={target}: exists already; pass another folder or overwrite")
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"out={target}: cannot be written to ({error.strerror})") from None
    try:
        yield temporary
        _take_place(temporary, target, overwrite, keep_existing)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, target: Path, overwrite: bool, keep_existing: bool) -> None:
    if overwrite and target.exists():
        old = target.with_name(f"{temporary.name}.old")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        temporary.rename(target)  # replaces an empty folder, fails on a filled one
    except OSError as error:
        if not keep_existing or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


class ShardWriter:
    """Collects tensors and writes a shard whenever the next tensor would exceed `max_shard_bytes`.

    Holds at most one shard in memory. `finish` gives the files their final names and writes the index; a single
    shard becomes `<stem>.safetensors` without one.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES, stem: str = "model"):
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes}: must be at least 1")
        self.folder, self.max_shard_bytes, self.stem = folder, max_shard_bytes, stem
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.added_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        # A view (rows of a fused weight, say) is copied, so that the shard holds its own memory only.
        tensor = tensor.detach().cpu().contiguous()
        self.pending[key] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        self.pending_bytes += tensor.nbytes
        self.added_bytes += tensor.nbytes

    def _flush(self) -> None:
        path = self.folder / f"{self.stem}.{len(self.shards)}.part"
        path.touch()
        mode = path.stat().st_mode  # what the umask gives; safetensors makes its files private
        save_file(self.pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        if self.pending or not self.shards:
            self._flush()
        count = len(self.shards)
        weight_map = {}
        for i, keys in enumerate(self.shards):
            name = f"{self.stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{self.stem}.safetensors"
            (self.folder / f"{self.stem}.{i}.part").rename(self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {"metadata": {"total_size": self.added_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)


def save_module(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    stem: str = "model",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder of one encoder or VAE, made where it is not there: its tensors by key, and config.json.

    Args:
        dtype: that tensors are stored in; None keeps theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, stem=stem)
    for key, tensor in tensors:
        writer.add(key, tensor.detach().to(dtype or tensor.dtype))
    writer.finish()
    write_json(folder / "config.json", config)


def with_prefix(name: str, prefix: str) -> str:
    """transformers 4 has a prefix before all names of an encoder, transformers 5 before none."""
    return name if name.startswith(prefix) else prefix + name


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and processor files."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def authors_tensors(model: UniWorld) -> Iterable[tuple[str, Tensor]]:
    """Every tensor of the checkpoint under its name in the authors' layout; fused q, k, v come apart as views."""
    for part, module in model.checkpoint_modules():
        for name, tensor in module.named_parameters():  # a tied weight comes once
            keys = authors_names(part, name)
            yield from zip(keys, tensor.detach().chunk(len(keys)) if len(keys) > 1 else [tensor.detach()])


def saved_config(model: UniWorld) -> dict[str, Any]:
    """The checkpoint's config with what may have changed since loading: dtype, picture area, references, training."""
    config = {**model.config, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    own = {key: value for key, value in config.get("uniworld", {}).items() if key != "references"}
    if model.references != REFERENCES[0]:
        own["references"] = model.references
    if "uniworld" in config or own or model.anchor_px != FULL_ANCHOR_PX or model.random_weights:
        config["uniworld"] = {**own, "anchor_px": model.anchor_px, "random_weights": model.random_weights}
    return config


def save_uniworld(
    model: UniWorld, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES, *, overwrite: bool = False
) -> Path:
    """Save VLM, denoiser, connectors and task head in the authors' layout, with config, tokenizer and processor.

    FLUX's other parts and SigLIP are frozen: they stay in their own folders. Weights keep their dtype. The folder
    appears under its name only when it is complete.

    Raises:
        ValueError: the folder exists and is not empty (unless `overwrite`), or cannot be written.
    """
    folder = Path(folder)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        writer = ShardWriter(temporary, max_shard_bytes)
        for key, tensor in authors_tensors(model):
            writer.add(key, tensor)
        writer.finish()
        write_json(temporary / "config.json", saved_config(model))
        copy_side_files(model.folder, temporary)
        if model.task_head is not None:
            state = {name: tensor.detach().cpu() for name, tensor in model.task_head.state_dict().items()}
            torch.save(state, temporary / TASK_HEAD_FILE)
    return folder
