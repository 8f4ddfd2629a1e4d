"""Reads what `uniworld precompute` stored: batches of encoder states in the order of live training.

A cache is a folder of shards that nothing but their number places: sample `n`, if usable the k-th, lies in shard
`k // samples_per_shard`. `manifest.json` says what it was made of, `index.npz` what the loader plans with. Several of
the same encoders and settings are read as one, their samples numbered through as those of their sources would be.

Letters: B batch, L VLM tokens, N samples.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from uniworld.checkpoint.locate import read_json
from uniworld.config import TrainConfig
from uniworld.data.bad import BadSample, BadSamples
from uniworld.data.dataset import Dataset, SampleIndex
from uniworld.data.loader import Loaded, Loader, Reader
from uniworld.train.fingerprint import differences, encoder_fingerprint, settings_fingerprint
from uniworld.train.model import EncodedBatch
from uniworld.train.stages import inserts_siglip

MANIFEST, INDEX, COMMON = "manifest.json", "index.npz", "common.safetensors"
MAX_OPEN_SHARDS = 1024  # each a mapping of memory and its parsed header; to open one takes longer than to read a batch


@dataclass(frozen=True)
class Cache:
    """A cache folder."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / MANIFEST)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """rows [N, 4] as in `SampleIndex`, buckets [N], tokens and tokens_siglip [N] without and with semantic ones."""
        with np.load(self.folder / INDEX, allow_pickle=False) as file:
            return dict(file)

    @property
    def index(self) -> SampleIndex:
        bad = {int(number): BadSample(**sample) for number, sample in self.manifest["unusable"].items()}
        return SampleIndex(self.arrays["rows"], bad)

    @cached_property
    def place(self) -> np.ndarray:
        """[N], which of the usable samples each is."""
        place = np.full(len(self.arrays["rows"]), -1)
        place[self.index.usable] = np.arange(len(self.index.usable))
        return place

    @property
    def num_shards(self) -> int:
        return -(-len(self.index.usable) // self.manifest["samples_per_shard"])

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def shard_of(self, number: int) -> Path:
        """Where a usable sample lies."""
        return self.shard(int(self.place[number]) // self.manifest["samples_per_shard"])

    def missing_shards(self) -> list[int]:
        here = {path.name for path in self.folder.glob("shard-*.safetensors")}
        return [number for number in range(self.num_shards) if self.shard(number).name not in here]


@dataclass(frozen=True)
class Caches:
    """Caches that are read as one, in this order."""

    parts: tuple[Cache, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """[parts + 1], the number of each one's first sample, and of all."""
        return np.cumsum([0, *(len(part.arrays["rows"]) for part in self.parts)])

    @property
    def index(self) -> SampleIndex:
        bad = {start + n: sample for part, start in self._numbered for n, sample in part.index.bad.items()}
        return SampleIndex(self.array("rows"), bad)

    @property
    def groups(self) -> list[tuple[int, int, float]]:
        """(first, end, weight) of each source."""
        groups = [(start, group) for part, start in self._numbered for group in part.manifest["groups"]]
        return [(start + first, start + end, weight) for start, (first, end, weight) in groups]

    @property
    def samples_of_source(self) -> Counter[str]:
        return sum((Counter(part.manifest["samples_of_source"]) for part in self.parts), Counter())

    @property
    def data_list(self) -> list[str]:
        """As `data_fingerprint` of all sources."""
        return [source for part in self.parts for source in part.manifest["fingerprint"]["the data list"]]

    def array(self, name: str) -> np.ndarray:
        return np.concatenate([part.arrays[name] for part in self.parts])

    def locate(self, number: int) -> tuple[Cache, int]:
        """The cache of a sample, and its number there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.parts[part], number - int(self.starts[part])

    @property
    def _numbered(self) -> list[tuple[Cache, int]]:
        return list(zip(self.parts, self.starts.tolist()))


def open_caches(config: TrainConfig) -> Caches:
    """The caches that `config.data.precomputed` names.

    Raises:
        FileNotFoundError: one is not there, or not finished.
        ValueError: one was made with other encoders, settings or data, which the message names.
    """
    caches = Caches(tuple(_open_cache(Path(folder)) for folder in config.data.precomputed))
    wanted = wanted_fingerprint(config)
    for cache in caches.parts:
        fingerprint = cache.manifest["fingerprint"] | {"the data list": caches.data_list}
        check_fingerprint(fingerprint, wanted, _where(cache.folder))
    return caches


def _open_cache(folder: Path) -> Cache:
    where = _where(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{where}: holds no {MANIFEST}; make it with: uniworld precompute CONFIG -o {folder}")
    cache = Cache(folder)
    if missing := cache.missing_shards():
        done = cache.num_shards - len(missing)
        raise FileNotFoundError(
            f"{where}: is not finished, {done} of {cache.num_shards} shards are there; run uniworld precompute again"
        )
    return cache


def _where(folder: Path) -> str:
    return f"data.precomputed={folder}"


def wanted_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Of the cache that `config` needs; of any data where it names none."""
    wanted = settings_fingerprint(config) | encoder_fingerprint(config)
    if config.data.sources:
        wanted["the data list"] = data_fingerprint(Dataset(config.data.sources))
    return wanted


def check_fingerprint(cached: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raise a ValueError that says in what a cache differs from the wanted one."""
    if found := differences(cached, wanted):
        raise ValueError(f"{where}: does not fit this config ({'; '.join(found)}); precompute into another folder")


def data_fingerprint(dataset: Dataset) -> list[str]:
    """Of each part; changes when an annotation does."""
    return [f"{len(part)}:{part.fingerprint}" for part in dataset.parts]


class PrecomputedLoader(Loader):
    """`Loader` over caches: the same order, buckets, balance and position, and batches of states.

    Args: as of `Loader`.
    Raises: as `open_caches`.
    """

    def __init__(self, config: TrainConfig, *, rank: int = 0, world_size: int = 1, bad_log: Path | None = None):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to {world_size - 1}")
        self.config, self.rank, self.world_size = config, rank, world_size
        caches = open_caches(config)
        self.index, groups = caches.index, caches.groups
        self.bad = BadSamples(config.data.max_bad_share, bad_log)
        self.bad.record_unusable(caches.samples_of_source, list(self.index.bad.values()), quiet=rank > 0)
        if config.data.sources:
            groups = [(first, end, s.weight) for (first, end, _), s in zip(groups, config.data.sources)]
        tokens = caches.array("tokens_siglip" if inserts_siglip(config.stage) else "tokens")
        self._begin(CachedReader(caches, config), groups, caches.array("buckets"), tokens)


class CachedReader(Reader):
    """Reads planned batches from the shards; opens files in the process that uses them."""

    def __init__(self, caches: Caches, config: TrainConfig):
        super().__init__(config)
        self.caches = caches
        self.use_siglip, self.use_t5 = inserts_siglip(config.stage), config.model.use_t5
        self.pooled = load_file(caches.parts[0].folder / COMMON)["pooled"]
        self._open: OrderedDict[Path, tuple[Any, dict[str, Any]]] = OrderedDict()

    def __getitem__(self, items: tuple[tuple[int, int], ...]) -> Loaded:
        parts, bad, num_read = [], [], Counter()
        for number, round in items:
            cache, own_number = self.caches.locate(number)
            shard, records = self._shard(cache.shard_of(own_number))
            record = records[str(own_number)]
            num_read[record["source"]] += 1
            if "bad" in record:
                bad.append(BadSample(**record["bad"]))
            else:
                parts.append(self._sample(shard, own_number, record, self.drops_prompt(number, round)))
        return Loaded(join(parts, self.pooled) if parts else None, dict(num_read), bad)

    def _sample(self, shard: Any, number: int, record: dict[str, Any], dropped: bool) -> dict[str, Any]:
        words = "dropped" if dropped else "full"
        names = [f"{words}.vlm_states", "latent_mean", "latent_std"]
        names += [f"{words}.t5_states"] * self.use_t5 + ["siglip_states"] * self.use_siglip + ["region_weight"]
        found = {
            name.removeprefix(f"{words}."): shard.get_tensor(f"{number}.{name}")
            for name in names
            if name in record["tensors"]
        }
        return found | {"image_ends": record["image_ends"][words], "id": record["id"]}

    def _shard(self, path: Path) -> tuple[Any, dict[str, Any]]:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it and run uniworld precompute again") from None
        while len(self._open) >= MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[path] = shard, json.loads(shard.metadata()["samples"])
        return self._open[path]


def join(parts: Sequence[dict[str, Any]], pooled: Tensor) -> EncodedBatch:
    """A batch of stored samples, padded on the left as live encoding pads.

    Args:
        parts: the tensors of `EncodedBatch` without the batch dimension, image_ends and id. pooled: [P].
    """
    states = [part["vlm_states"] for part in parts]
    longest = max(len(rows) for rows in states)
    padding = [longest - len(rows) for rows in states]
    columns = torch.arange(longest)
    siglip = [part["siglip_states"] for part in parts if "siglip_states" in part]
    weights = [part.get("region_weight") for part in parts]
    ones = torch.ones(1, *parts[0]["latent_mean"].shape[1:])
    return EncodedBatch(
        vlm_states=torch.stack([pad(rows, (0, 0, n, 0)) for rows, n in zip(states, padding)]),
        attention_mask=torch.stack([(columns >= n).long() for n in padding]),
        image_ends=tuple(tuple(end + n for end in part["image_ends"]) for part, n in zip(parts, padding)),
        siglip_states=torch.cat(siglip) if siglip else None,
        t5_states=torch.stack([part["t5_states"] for part in parts]) if "t5_states" in parts[0] else None,
        pooled=pooled.expand(len(parts), -1),
        latent_mean=torch.stack([part["latent_mean"] for part in parts]),
        latent_std=torch.stack([part["latent_std"] for part in parts]),
        region_weight=None
        if all(weight is None for weight in weights)
        else torch.stack([ones if weight is None else weight for weight in weights]),
        sample_ids=tuple(part["id"] for part in parts),
    )
