"""WebDataset tar shards as an indexable source: the headers are read once and kept, members are read by offset.

A sample is the members of one key: `KEY.json` with the `conversations` of the authors' format or a `prompt`, or
`KEY.txt` with the prompt alone, and its pictures: `KEY.0.jpg, KEY.1.png, ...` in the order of their marks with the
target last, or `KEY.jpg` where there is only a target.
"""

import glob
import json
import re
import tarfile
from pathlib import Path

import numpy as np

from uniworld.data.cache import Arrays, cached_arrays
from uniworld.data.samples import Picture, Sample, conversation_of, make_sample
from uniworld.data.sources import PackedRecords, fingerprint_of

PICTURE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp|bmp|tiff?)", re.IGNORECASE)
MAX_TEXT_BYTES = 1 << 20


class ShardSource:
    """Local, uncompressed tar files: a folder, a glob or braces such as "shard-{000..031}.tar"."""

    def __init__(self, path: str):
        self.name = path
        self.shards = expand_shards(path)
        self.fingerprint = fingerprint_of(self.shards)
        arrays = cached_arrays(f"shards-{self.fingerprint}", self._index)
        self.records = PackedRecords(arrays["data"], arrays["offsets"])
        if not len(self.records):
            raise ValueError(f"{path}: the shards hold no samples")

    def __len__(self) -> int:
        return len(self.records)

    def sample_id(self, index: int) -> str:
        shard, key, _ = self.records[index]
        return f"{self.shards[shard].name}:{key}"

    def __getitem__(self, index: int) -> Sample:
        number, key, members = self.records[index]
        shard = self.shards[number]
        found = {}
        for extension, offset, num_bytes in members:
            if match := PICTURE.fullmatch(extension):
                picture = Picture(f"{shard}:{key}.{extension}", (str(shard), offset, num_bytes))
                place = int(match[1] or 0)
                if place in found:
                    raise ValueError(f"{picture.name}: a second picture at place {place}")
                found[place] = picture
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"{shard}:{key}: pictures are numbered {sorted(found)}, must be 0, 1, ...")
        pictures = [found[place] for place in sorted(found)]
        record = self._annotation(shard, key, members)
        conversations = record.get("conversations")
        if conversations is None:
            conversations = conversation_of(record.get("prompt"), max(0, len(pictures) - 1))
        return make_sample(
            self.sample_id(index),
            conversations,
            pictures,
            need_weight=record.get("need_weight", True),
            focus=record.get("focus"),
        )

    def _annotation(self, shard: Path, key: str, members: list) -> dict:
        texts = {extension: (offset, size) for extension, offset, size in members if extension in ("json", "txt")}
        if not texts:
            raise ValueError(f"{shard}:{key}: has no {key}.json and no {key}.txt")
        extension = "json" if "json" in texts else "txt"
        offset, num_bytes = texts[extension]
        if num_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"{shard}:{key}.{extension}: has {num_bytes} bytes, at most {MAX_TEXT_BYTES}")
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(num_bytes)
        if extension == "txt":
            return {"prompt": data.decode("utf-8")}
        record = json.loads(data)
        if not isinstance(record, dict):
            raise ValueError(f"{shard}:{key}.json: must be an object with conversations or prompt")
        return record

    def _index(self, stored: Arrays | None) -> Arrays:
        if stored is not None:
            return stored
        packed = PackedRecords.pack(
            [number, key, members]
            for number, shard in enumerate(self.shards)
            for key, members in read_members(shard).items()
        )
        return {"data": packed.data, "offsets": packed.offsets.astype(np.int64)}


def expand_shards(path: str) -> list[Path]:
    """The shards that a folder, a glob or braces name, each of which must exist."""
    from braceexpand import braceexpand

    if Path(path).is_dir():
        path = f"{glob.escape(path)}/*.tar"
    shards = []
    for pattern in braceexpand(path):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise FileNotFoundError(f"{pattern}: matches no shard")
        shards += map(Path, found)
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such shard")
    return shards


def read_members(shard: Path) -> dict[str, list[tuple[str, int, int]]]:
    """key -> (extension, offset, number of bytes) of its members, in the shard's order."""
    from webdataset.tariterators import base_plus_ext

    members: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name) if member.isreg() else (None, None)
                if key:
                    members.setdefault(key, []).append((extension.lower(), member.offset_data, member.size))
                tar.members = []  # it would keep them all
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not an uncompressed tar file ({error})") from None
    return members
