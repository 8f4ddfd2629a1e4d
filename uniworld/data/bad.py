"""Samples that could not be used: counted, logged with path and reason, and too many of them stop the run."""

import json
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_KEPT = 20  # of the last bad samples, for reports
GRACE = 1000  # samples: until so many were read, the allowed share is one of this number
log = logging.getLogger("uniworld.data")


class SampleError(ValueError):
    """Why a sample cannot be used."""

    def __init__(self, path: str, reason: str):
        # Names and texts of a data set are anybody's: no control characters reach a terminal or a log.
        self.path, self.reason = _printable(path), _printable(reason)
        super().__init__(f"{self.path}: {self.reason}")

    @classmethod
    def of(cls, path: str, error: Exception) -> "SampleError":
        """The error of whatever went wrong with `path`, in one line that does not name it twice."""
        if isinstance(error, SampleError):
            return error
        text = " ".join(str(error).split()).removeprefix(f"{path}: ") or type(error).__name__
        if not isinstance(error, ValueError | OSError):
            text = f"{type(error).__name__}: {text}"
        return cls(path, text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """source: the name of its source; id: of the sample; path: of what is wrong; reason: one line."""

    source: str
    id: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.id}: {self.path}: {self.reason}"


class TooManyBadSamples(ValueError):
    """More samples than allowed could not be used; `table` shows how many of which source, and the last ones."""

    def __init__(self, message: str, table: str):
        super().__init__(f"{message}\n{table}")
        self.table = table


class BadSamples:
    """The report of a rank.

    Args:
        max_share: of the samples read, above which the run stops.
        log_file: gets every bad sample as a JSON line, or None.
    """

    def __init__(self, max_share: float, log_file: Path | None = None):
        self.max_share, self.log_file = max_share, log_file
        self.num_samples: Counter[str] = Counter()
        self.num_unusable: Counter[str] = Counter()
        self.num_read: Counter[str] = Counter()
        self.num_bad: Counter[str] = Counter()
        self.last: deque[BadSample] = deque(maxlen=NUM_KEPT)

    @property
    def total_read(self) -> int:
        return self.num_read.total()

    @property
    def count(self) -> int:
        """Bad samples that were read for training; `num_unusable` were never read."""
        return self.num_bad.total()

    def record_unusable(self, num_samples: Mapping[str, int], bad: Sequence[BadSample], quiet: bool = False) -> None:
        """Samples that are left out from the start, as their annotation or header is wrong.

        Args:
            num_samples: of each source, good ones too.
            quiet: do not log them (another rank does).

        Raises: TooManyBadSamples where they are over the allowed share of all.
        """
        self.num_samples.update(num_samples)
        self.num_unusable.update(sample.source for sample in bad)
        self._keep(bad, quiet)
        total, unusable = self.num_samples.total(), self.num_unusable.total()
        if unusable > self.max_share * total:
            self._stop(f"{unusable} of {total} samples cannot be used")

    def record(self, num_read: Mapping[str, int], bad: Sequence[BadSample]) -> None:
        """Samples that were read for training. Raises TooManyBadSamples where the share is now above the limit."""
        self.num_read.update(num_read)
        self.num_bad.update(sample.source for sample in bad)
        self._keep(bad, quiet=False)
        if bad and self.count > self.max_share * max(self.total_read, GRACE):
            self._stop(f"{self.count} of {self.total_read} samples read could not be used")

    def _keep(self, bad: Sequence[BadSample], quiet: bool) -> None:
        self.last.extend(bad)
        if quiet or not bad:
            return
        for sample in bad:
            log.warning("bad sample skipped: %s", sample)
        if self.log_file is not None:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)

    def _stop(self, message: str) -> None:
        raise TooManyBadSamples(f"data.max_bad_share={self.max_share}: {message}", self.table())

    def table(self) -> str:
        """Counts by source, then the last bad samples, as plain text."""
        rows = [("source", "samples", "unusable", "read", "bad", "share of read")]
        for source in sorted(self.num_samples | self.num_read):
            read, bad = self.num_read[source], self.num_bad[source]
            counts = (self.num_samples[source], self.num_unusable[source], read, bad)
            rows.append((source, *map(str, counts), f"{bad / read:.2%}" if read else "-"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        return "\n".join([*lines, "last bad samples:", *(f"  {sample}" for sample in self.last)])

    def state_dict(self) -> dict[str, Any]:
        """What was read so far; what cannot be used is found anew at every start."""
        return {
            "num_read": dict(self.num_read),
            "num_bad": dict(self.num_bad),
            "last": [asdict(sample) for sample in self.last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_read, self.num_bad = Counter(state["num_read"]), Counter(state["num_bad"])
        self.last = deque((BadSample(**sample) for sample in state["last"]), maxlen=NUM_KEPT)
