"""Where samples come from: the interface of the authors' format, tar shards and tables, and what these share.

Records are kept as bytes in one array, so that worker processes forked from the trainer share them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uniworld.data.samples import Sample


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


def fingerprint_of(files: Iterable[Path], *settings: Any) -> str:
    """Names, sizes and times of files, and settings, as one hash."""
    parts = [repr(settings)]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
