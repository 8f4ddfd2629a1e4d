"""Arrays that take long to make, kept in the cache folder; of several processes one makes them."""

import contextlib
import fcntl
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from uniworld.checkpoint.tiny import cache_root

Arrays = dict[str, np.ndarray]


def cached_arrays(key: str, make: Callable[[Arrays | None], Arrays]) -> Arrays:
    """The arrays stored under `key`, after `make(stored or None)` had its say; what it returns is stored if new.

    Where the cache cannot be written to, each process makes its own.
    """
    path = cache_root() / "data" / f"{key}.npz"
    with _locked(path):
        stored = _read(path)
        arrays = make(stored)
        if arrays is not stored:
            _write(path, arrays)
        return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}.partial")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError:
        pass  # a cache saves time only
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file beside `path`, so that of the ranks of a machine one works and the others read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
