"""Where samples come from: one indexable interface over the authors' format, tar shards and tables.

Records are kept as bytes in one array, so that worker processes forked from the trainer share them.
"""

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uniworld.config import SourceConfig
from uniworld.data.samples import Picture, Sample, as_bool, make_sample, resolve_path


class Source(Protocol):
    """Samples by number.

    name: for tables and logs. fingerprint: changes when the annotations do.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises ValueError or OSError where the record makes no sample."""

    def sample_id(self, index: int) -> str:
        """Where the record lies; also of one that makes no sample."""


class PackedRecords(Sequence):
    """JSON values, each as bytes in one array."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    @classmethod
    def pack(cls, records: Iterable[Any]) -> "PackedRecords":
        texts = [json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") for record in records]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(texts), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        text = self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return json.loads(text.decode("utf-8", "surrogatepass"))


class AuthorsSource:
    """One line of the authors' `data.txt`: a folder of pictures, a JSON list of annotations, and `need_weight`."""

    def __init__(self, image_root: Path, annotations: Path, need_weight: bool):
        self.image_root, self.need_weight = image_root, need_weight
        self.name, self.stem = str(annotations), annotations.name
        self.records = PackedRecords.pack(_read_list(annotations))
        self.fingerprint = fingerprint_of([annotations], image_root, need_weight)

    def __len__(self) -> int:
        return len(self.records)

    def sample_id(self, index: int) -> str:
        return f"{self.stem}:{index}"

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        if not isinstance(record, dict):
            raise ValueError(f"record={record!r:.80}: must be an object with image and conversations")
        names = record.get("image")
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"image={names!r:.80}: must be a path or a list of paths")
        paths = [resolve_path(self.image_root, name) for name in names]
        pictures = [Picture(path, path) for path in paths]
        need_weight = self.need_weight and as_bool("need_weight", record.get("need_weight", True))
        return make_sample(
            self.sample_id(index), record.get("conversations"), pictures, need_weight=need_weight
        )


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: must be a JSON list of samples")
    return records


def open_authors(path: Path) -> list[AuthorsSource]:
    """Every line of a `data.txt`. Relative paths are below its folder, or else below the working folder."""
    sources = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path} line {number}"
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3:
            raise ValueError(f"{where}: must be image_root,annotations.json,need_weight, got {line.strip()!r:.120}")
        image_root, annotations = (_beside(path, field) for field in fields[:2])
        if not image_root.is_dir():
            raise FileNotFoundError(f"{where}: image_root {image_root}: no such folder")
        if not annotations.is_file():
            raise FileNotFoundError(f"{where}: {annotations}: no such file")
        sources.append(AuthorsSource(image_root, annotations, as_bool(f"{where}: need_weight", fields[2])))
    if not sources:
        raise ValueError(f"{path}: has no line image_root,annotations.json,need_weight")
    return sources


def _beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() or not Path(name).exists() else Path(name)


def open_source(config: SourceConfig) -> list[Source]:
    """The parts of a configured source: a `data.txt` has one a line, shards and tables are one.

    Raises: ValueError or FileNotFoundError naming the path.
    """
    kind = _guess_kind(config.path) if config.kind == "auto" else config.kind
    if kind == "authors":
        path = Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return list(open_authors(path))
    if kind == "webdataset":
        from uniworld.data.shards import ShardSource

        return [ShardSource(config.path)]
    from uniworld.data.tables import TableSource

    return [TableSource(config.path, config.columns)]


def _guess_kind(path: str) -> str:
    if path.endswith(".tar"):
        return "webdataset"
    if path.endswith(".parquet"):
        return "parquet"
    if path.endswith(".txt"):
        return "authors"
    if Path(path).is_dir():
        return "webdataset" if glob.glob(f"{glob.escape(path)}/*.tar") else "parquet"
    raise ValueError(f"path={path}: cannot tell its kind; set kind to authors, webdataset or parquet")


def fingerprint_of(files: Iterable[Path], *settings: Any) -> str:
    """Names, sizes and times of files, and settings, as one hash."""
    parts = [repr(settings)]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
