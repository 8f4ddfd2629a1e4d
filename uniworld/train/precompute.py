"""Runs the frozen encoders once over a data set and stores their states, so that training loads none of them.

Every sample is encoded alone, as live training with a batch of one does: the same bits. Shards appear under their names
when they are complete, so an interrupted run goes on with the next one. Several processes (torchrun) share the shards
without talking to each other.
"""

import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.progress import count_progress
from uniworld.config import TrainConfig, to_yaml
from uniworld.data.bad import BadSample, SampleError
from uniworld.data.batch import TrainBatch
from uniworld.data.loader import Loader, estimate_tokens
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.unified import UniWorld
from uniworld.train.encode import Encoders
from uniworld.train.fingerprint import encoder_fingerprint, settings_fingerprint
from uniworld.train.model import EncodedBatch
from uniworld.train.precomputed import (
    COMMON,
    INDEX,
    MANIFEST,
    Cache,
    check_fingerprint,
    data_fingerprint,
    wanted_fingerprint,
)
from uniworld.train.sharding import DTYPES
from uniworld.train.stages import inserts_siglip
from uniworld.train.variants import apply_variant

SAMPLES_PER_SHARD = 128  # about 0.7 GB at 512 x 512 with one reference
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Done:
    """How a run ended: shards of all processes, and samples that this process found bad."""

    folder: Path
    num_shards: int
    num_missing: int
    """Shards that other processes have not finished yet."""
    num_samples: int
    num_bytes: int


@dataclass(frozen=True)
class Prepared:
    """A sample ready for the encoders, or why it is none; `dropped` is the same without its words."""

    number: int
    source: str
    full: TrainBatch | None = None
    dropped: TrainBatch | None = None
    bad: BadSample | None = None


def precompute(
    config: TrainConfig,
    folder: str | Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | None = None,
    progress: Progress = lambda done, total: None,
    show_loading: bool = True,
) -> Done:
    """Store the states of every usable sample of `config.data.sources`.

    Args:
        folder: of the cache; where one was begun with the same encoders, settings and data, it is completed.
        samples_per_shard: of a new cache.
        rank, world_size: this process makes every `world_size`-th shard.
        progress: called with (samples done, samples to do) of this process.

    Raises:
        ValueError: the folder holds a cache of something else, which the message names; or too many bad samples.
        OSError: the disk is full; complete shards stay.
    """
    if config.data.precomputed:
        named = ",".join(config.data.precomputed)
        raise ValueError(f"data.precomputed={named}: must not be set here; name data.sources")
    if config.model.needs_live_encoding:
        raise ValueError("model.references=vae and model.num_queries need live encoding; nothing is to be precomputed")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}: must be at least 1")
    model = load_uniworld(
        config.model.path,
        config.model.flux,
        config.model.siglip,
        device=device,
        dtype=DTYPES[config.sharding.dtype],
        progress=show_loading,
        use_t5=config.model.use_t5,
    )
    apply_variant(config, model)
    cache, reader = _open(config, Path(folder), model, samples_per_shard, show_loading)
    encoders = Encoders(model, use_siglip=inserts_siglip(config.stage), use_t5=config.model.use_t5)
    mine = [number for number in cache.missing_shards() if number % world_size == rank]
    members = {number: _members(cache, number) for number in mine}
    total, done = sum(map(len, members.values())), 0
    progress(done, total)
    numbers = [sample for number in mine for sample in members[number]]
    arriving = _arrivals(reader, numbers, config.data.num_workers)
    for number in mine:
        tensors, records = {}, {}
        for _ in members[number]:
            prepared = next(arriving)
            reader.bad.record({prepared.source: 1}, [] if prepared.bad is None else [prepared.bad])
            _encode(prepared, encoders, tensors, records)
            done += 1
            progress(done, total)
        _write(cache.shard(number), tensors, {"samples": json.dumps(records)})
    left = cache.missing_shards()
    num_bytes = sum(path.stat().st_size for path in cache.folder.glob("shard-*.safetensors"))
    return Done(cache.folder, cache.num_shards, len(left), len(cache.index.usable), num_bytes)


class SampleReader(TorchDataset):
    """Reads and prepares samples by number; runs in the worker processes."""

    def __init__(self, config: TrainConfig, model: UniWorld, progress: Progress):
        encoder = model.semantic_encoder
        preprocess = SemanticEncoder(torch.nn.Identity(), encoder.preprocessor).preprocess
        preprocess = preprocess if inserts_siglip(config.stage) else None
        loader = Loader(config, processor=model.processor, siglip_preprocess=preprocess, progress=progress)
        self.dataset, self.index, self.bad = loader.dataset, loader.index, loader.bad
        planned = loader.reader
        self.collator, self.buckets, self.bucket_sizes = planned.collator, planned.buckets, planned.bucket_sizes
        self.drops = config.data.drop_prompt_rate > 0
        layout = self.dataset, self.index, self.collator.processor, self.buckets, self.bucket_sizes
        self.tokens = {
            "tokens": estimate_tokens(*layout, siglip_tokens=0),
            "tokens_siglip": estimate_tokens(*layout, siglip_tokens=encoder.num_tokens),
        }

    def __getitem__(self, number: int) -> Prepared:
        source = self.dataset.locate(number)[0].name
        try:
            sample, bucket = self.dataset[number], self.bucket_sizes[self.buckets[number]]
            full = self._batch(sample, bucket)
            dropped = self._batch(sample.without_prompt(), bucket) if self.drops else None
            return Prepared(number, source, full, dropped)
        except SampleError as error:
            return Prepared(number, source, bad=self.dataset.bad_sample(number, error))

    def _batch(self, sample: Any, bucket: tuple[int, int]) -> TrainBatch:
        return self.collator.collate([self.collator.prepare(sample, bucket)])


def _open(
    config: TrainConfig, folder: Path, model: UniWorld, samples_per_shard: int, show_loading: bool
) -> tuple[Cache, SampleReader]:
    """The cache, begun where there is none yet, and what reads its samples."""
    if (folder / MANIFEST).is_file():
        check_fingerprint(Cache(folder).manifest["fingerprint"], wanted_fingerprint(config), f"output={folder}")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output={folder}: is not empty and holds no {MANIFEST}; choose another folder")
    with count_progress("Reading picture sizes", show_loading) as indexing:
        reader = SampleReader(config, model, indexing)
    if (folder / MANIFEST).is_file():
        return Cache(folder), reader
    folder.mkdir(parents=True, exist_ok=True)
    dataset, index = reader.dataset, reader.index
    arrays = {"rows": index.rows, "buckets": reader.buckets, **reader.tokens}
    _replace(folder / INDEX, lambda path: _save_arrays(path, arrays))
    pooled = model.text_encoders.pooled([""])[0].to(model.dtype).cpu().contiguous()
    _write(folder / COMMON, {"pooled": pooled}, {})
    samples_of_source: dict[str, int] = {}
    for part in dataset.parts:
        samples_of_source[part.name] = samples_of_source.get(part.name, 0) + len(part)
    data = {"the data list": data_fingerprint(dataset)}
    manifest = {
        "fingerprint": settings_fingerprint(config) | encoder_fingerprint(config) | data,
        "samples_per_shard": samples_per_shard,
        "groups": dataset.groups,
        "samples_of_source": samples_of_source,
        "unusable": {str(number): asdict(sample) for number, sample in index.bad.items()},
    }
    _replace(folder / "config.yaml", lambda path: path.write_text(to_yaml(config), encoding="utf-8"))
    _replace(folder / MANIFEST, lambda path: path.write_text(json.dumps(manifest), encoding="utf-8"))
    return Cache(folder), reader


def _members(cache: Cache, shard: int) -> list[int]:
    size = cache.manifest["samples_per_shard"]
    return cache.index.usable[shard * size : (shard + 1) * size].tolist()


def _arrivals(reader: SampleReader, numbers: list[int], num_workers: int) -> Iterator[Prepared]:
    """Prepared samples in the order of `numbers`, read ahead by worker processes where there are any."""
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_init_worker,
    )
    return iter(loader)


def _encode(prepared: Prepared, encoders: Encoders, tensors: dict[str, Tensor], records: dict[str, Any]) -> None:
    """Add the states of one sample to its shard."""
    record: dict[str, Any] = {"source": prepared.source}
    records[str(prepared.number)] = record
    if prepared.full is None:
        record["bad"] = asdict(prepared.bad)
        return
    full = encoders.encode(prepared.full)
    own = {
        "full.vlm_states": full.vlm_states[0],
        "latent_mean": full.latent_mean[0],
        "latent_std": full.latent_std[0],
        "siglip_states": full.siglip_states,
        "full.t5_states": _first(full.t5_states),
        "region_weight": _first(full.region_weight),
    }
    record |= {"id": full.sample_ids[0], "image_ends": {"full": full.image_ends[0]}}
    if prepared.dropped is not None:
        dropped = _encode_text(prepared.dropped, encoders)
        own |= {"dropped.vlm_states": dropped.vlm_states[0], "dropped.t5_states": _first(dropped.t5_states)}
        record["image_ends"]["dropped"] = dropped.image_ends[0]
    own = {name: tensor.cpu().contiguous() for name, tensor in own.items() if tensor is not None}
    record["tensors"] = list(own)
    tensors |= {f"{prepared.number}.{name}": tensor for name, tensor in own.items()}


def _encode_text(batch: TrainBatch, encoders: Encoders) -> EncodedBatch:
    """Encode once more with other words; what depends on pictures alone is made small, it is not kept."""
    return encoders.encode(replace(batch, siglip_pixels=None, target=batch.target[:, :, :16, :16]))


def _first(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[0]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Views of a batch would drag the whole batch along.
    own = {k: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for k, t in tensors.items()}
    try:
        _replace(path, lambda part: save_file(own, part, metadata=metadata))
    except (SafetensorError, OSError) as error:
        free = os.statvfs(path.parent)
        space = f"{free.f_bavail * free.f_frsize / 2**30:.1f} GiB are free"
        raise OSError(
            f"{path}: cannot be written ({error}; {space}); complete shards stay, run again to go on"
        ) from None


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that appears under its name when it is complete and on the disk."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # what the umask gives; safetensors makes its files private
        write(part)
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _unchanged(prepared: Prepared) -> Prepared:
    return prepared


def _init_worker(_: int) -> None:
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
