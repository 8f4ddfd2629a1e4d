"""Writes one checkpoint: every rank its own files, at the same time, then rank 0 gives the folder its name.

The ranks find out about each other from marker files in the folder itself and not over the network, so that a writer
can work in the background while training uses the network. The folder must therefore be one that all ranks share.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from uniworld.train.checkpoints import commit, flush_file, hidden, rotate, write_durably

POLL_S = 0.01
FULL = (errno.ENOSPC, errno.EDQUOT)
GIB, MIB = 1024**3, 1024**2


@dataclass(kw_only=True)
class Writer:
    """One checkpoint on its way to the disk.

    Args:
        target: the checkpoint's folder; it is written under its hidden name, which must exist.
        rank, world_size: of this process.
        files: what this rank writes, by path in the folder: dicts of tensors where it ends in `.safetensors`, bytes,
            or whatever `torch.save` takes.
        manifest: what `checkpoint.json` says besides the files.
        keep: complete checkpoints that stay.
    """

    target: Path
    rank: int
    world_size: int
    files: dict[str, Any]
    manifest: dict[str, Any]
    keep: int
    error: OSError | None = field(default=None, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def start(self) -> None:
        """Write in the background; `files` must not change until `wait` returns."""
        self._thread = threading.Thread(target=self.run, name=f"write {self.target.name}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when this rank has nothing more to do; `error` then says whether it went well."""
        if self._thread is not None:
            self._thread.join()

    def run(self) -> None:
        """Write this rank's files; on rank 0 wait for the other ranks too, and finish the checkpoint."""
        temporary = hidden(self.target, "writing")
        try:
            sizes = {name: write_file(temporary / name, content) for name, content in self.files.items()}
            _mark(temporary, self.rank, {"files": sizes})
        except Exception as error:
            for name in self.files:  # first, since the markers need room on a full disk
                (temporary / name).unlink(missing_ok=True)
            self.error = self._explained(error)
            self._tell_rank_0(temporary)
        self.files = {}
        if self.rank == 0:
            self._finish(temporary)

    def _finish(self, temporary: Path) -> None:
        try:
            markers = [self._marker(temporary, rank) for rank in range(self.world_size)]
            failed = [m["error"] for m in markers if "error" in m]
            if failed:
                self.error = self.error or OSError(failed[0])
                return
            for rank in range(self.world_size):
                _marker_path(temporary, rank).unlink()
            files = {name: size for m in markers for name, size in m["files"].items()}
            commit(temporary, self.target, {**self.manifest, "files": files})
            rotate(self.target.parent, self.keep)
        except Exception as error:
            self.error = self._explained(error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _marker(self, temporary: Path, rank: int) -> dict[str, Any]:
        """What a rank reports, once it does."""
        if rank == 0 and self.error is not None:
            return {"error": str(self.error)}
        path = _marker_path(temporary, rank)
        while not path.exists():
            time.sleep(POLL_S)
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if text else {"error": f"{self.target}: not saved: rank {rank} could not write"}

    def _tell_rank_0(self, temporary: Path) -> None:
        if self.rank == 0:
            return
        try:
            _mark(temporary, self.rank, {"error": str(self.error)})
        except OSError:
            _marker_path(temporary, self.rank).touch()  # an empty one needs no room

    def _explained(self, error: Exception) -> OSError:
        """One line: what could not be saved, why, and what to do."""
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = self.target.parent
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        if getattr(error, "errno", None) in FULL or "No space left" in reason or "unexpected pos" in reason:
            needed = sum(num_bytes(content) for content in self.files.values()) * self.world_size
            reason = (
                f"the disk is full: a checkpoint takes about {in_words(needed)}, {in_words(free)} are free; "
                f"make room there, or lower checkpoint.keep={self.keep}"
            )
        return OSError(f"{self.target}: not saved, older checkpoints are untouched: {reason}")


class Collected:
    """Stands in for DeepSpeed's checkpoint engine and keeps what it would write."""

    def __init__(self):
        self.states: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.states[os.path.normpath(path)] = state_dict

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


def write_file(path: Path, content: Any) -> int:
    """Write and flush one file to the disk; returns its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        write_durably(path, content)
    elif path.suffix == ".safetensors":
        path.touch()
        mode = path.stat().st_mode  # what the umask gives; safetensors makes its files private
        save_file(content, path)
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    else:
        with path.open("wb") as file:
            torch.save(content, file)
            flush_file(file)
    return path.stat().st_size


def on_cpu(content: Any) -> Any:
    """A deep copy with every tensor on the CPU, sharing memory with nothing that training changes."""
    return mapped(content, lambda tensor: tensor.detach().to("cpu", copy=True))


def in_words(size: int) -> str:
    """Bytes in GiB, or MiB where they are fewer."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def num_bytes(content: Any) -> int:
    """Memory of all tensors in nested dicts, lists and tuples."""
    sizes: list[int] = []
    mapped(content, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes) + (len(content) if isinstance(content, bytes) else 0)


def mapped(content: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested dicts, lists and tuples with `change` applied to their tensors; other objects stay the same."""
    if isinstance(content, Tensor):
        return change(content)
    if isinstance(content, dict):
        kind = OrderedDict if isinstance(content, OrderedDict) else dict
        return kind((key, mapped(value, change)) for key, value in content.items())
    if isinstance(content, list) or type(content) is tuple:
        return type(content)(mapped(value, change) for value in content)
    return content


def _marker_path(temporary: Path, rank: int) -> Path:
    return temporary / f".rank-{rank:05d}.json"


def _mark(temporary: Path, rank: int, report: dict[str, Any]) -> None:
    """Write this rank's marker so that it is never seen half-written."""
    path = _marker_path(temporary, rank)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report), encoding="utf-8")
    part.rename(path)
