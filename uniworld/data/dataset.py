"""All configured sources as one sequence of samples, and what is known of every sample before it is decoded."""

import glob
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uniworld.config import SourceConfig
from uniworld.data.authors import open_authors
from uniworld.data.bad import BadSample, SampleError
from uniworld.data.cache import Arrays, cached_arrays
from uniworld.data.samples import Sample
from uniworld.data.sources import Source

NUM_THREADS = 16  # headers are read by network file systems one at a time
CHUNK = 2048
VERSION = 1  # of the stored arrays
FIELDS = ("height", "width", "num_references", "num_text_bytes")


@dataclass(frozen=True)
class SampleIndex:
    """One row a sample, int32 [N, 4]: the target's height and width by its header, references, bytes of text.

    height is 0 where the sample cannot be used. bad: those samples, by number.
    """

    rows: np.ndarray
    bad: dict[int, BadSample]

    @property
    def usable(self) -> np.ndarray:
        return np.flatnonzero(self.rows[:, 0] > 0)


class Dataset(Sequence):
    """Samples of all sources, numbered through.

    groups: (first, end, weight) of each configured source; it may have several parts (the lines of a `data.txt`).
    """

    def __init__(self, sources: Sequence[SourceConfig]):
        if not sources:
            raise ValueError("data.sources: must name at least one source")
        self.parts: list[Source] = []
        self.groups: list[tuple[int, int, float]] = []
        first = 0
        for source in sources:
            parts = open_source(source)
            end = first + sum(map(len, parts))
            if end == first:
                raise ValueError(f"data.sources: {source.path} has no samples")
            self.groups.append((first, end, source.weight))
            self.parts += parts
            first = end
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError."""
        source, number = self.locate(index)
        try:
            return source[number]
        except IndexError:
            raise
        except Exception as error:  # an annotation can be wrong in any way; over a share of them the run stops
            raise SampleError.of(source.name, error) from error

    def bad_sample(self, index: int, error: SampleError) -> BadSample:
        source, number = self.locate(index)
        return BadSample(source=source.name, id=source.sample_id(number), path=error.path, reason=error.reason)

    def read_index(self, progress: Callable[[int, int], None] | None = None) -> SampleIndex:
        """Read every target's header once; the rows are kept in the cache folder, those of bad samples are not.

        Args:
            progress: called with (headers read, headers to read) of the part at hand.
        """
        parts, bad = [], {}
        for source, start in zip(self.parts, self.starts.tolist()):
            errors: dict[int, SampleError] = {}
            arrays = cached_arrays(
                f"index-{VERSION}-{source.fingerprint}",
                lambda stored, source=source, errors=errors: _completed(source, stored, errors, progress),
            )
            parts.append(arrays["rows"])
            bad |= {start + number: self.bad_sample(start + number, error) for number, error in errors.items()}
        return SampleIndex(np.concatenate(parts), dict(sorted(bad.items())))


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


def _completed(
    source: Source,
    stored: Arrays | None,
    errors: dict[int, SampleError],
    progress: Callable[[int, int], None] | None,
) -> Arrays:
    """The stored rows with those of bad samples read anew: the files may have been mended."""
    rows = np.zeros((len(source), len(FIELDS)), np.int32)
    if stored is not None and stored.get("rows", rows[:0]).shape == rows.shape:
        rows = stored["rows"].copy()
    missing = np.flatnonzero(rows[:, 0] <= 0)

    def read(number: int) -> None:
        try:
            rows[number] = _row(source, number)
        except SampleError as error:
            errors[number] = error

    with ThreadPoolExecutor(NUM_THREADS if len(missing) > CHUNK else min(4, os.cpu_count() or 1)) as pool:
        for first in range(0, len(missing), CHUNK):
            list(pool.map(read, missing[first : first + CHUNK].tolist()))
            if progress is not None:
                progress(min(first + CHUNK, len(missing)), len(missing))
    unchanged = stored is not None and np.array_equal(stored.get("rows"), rows)
    return stored if unchanged else {"rows": rows}


def _row(source: Source, number: int) -> tuple[int, int, int, int]:
    path = source.name
    try:
        sample = source[number]
        path = sample.target.name
        height, width = sample.target.size()
        if min(height, width) < 1:
            raise ValueError(f"{width}x{height} has no pixels")
        return height, width, len(sample.references), sample.num_text_bytes
    except Exception as error:  # as in `Dataset.__getitem__`
        raise SampleError.of(path, error) from error
