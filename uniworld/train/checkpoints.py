"""Checkpoint folders of a run: which are complete, which is newest, how one takes its place and an old one goes.

A checkpoint is written into a hidden folder beside its place and renamed once all of it is on the disk, so that
whatever has the name `step-...` was complete at that moment. `checkpoint.json` lists every file with its size, and a
folder where one is missing or shorter counts as none.

    run_dir/checkpoints/step-00000020/checkpoint.json     step, ranks, ZeRO stage, trained parameters, files
                                      config.yaml         the resolved config
                                      deepspeed/          parameters, master weights and optimizer, by DeepSpeed
                                      ema/rank-00000.safetensors
                                      ranks/rank-00000.pt random states and data position
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "checkpoint.json"
CONFIG = "config.yaml"
DEEPSPEED = "deepspeed"
NAME = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.(step-\d{8,})\.(writing|old|replaced|universal)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def world_size(self) -> int:
        return self.manifest["world_size"]


def checkpoints_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def hidden(folder: Path, why: str) -> Path:
    """A folder beside `folder`: it while it is "writing", "old" and deleted, or "replaced"; its "universal" form."""
    return folder.with_name(f".{folder.name}.{why}")


def whats_wrong(folder: Path) -> str | None:
    """Why a folder is no complete checkpoint; None where it is one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"has format {manifest.get('format')}, this version reads {FORMAT}"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, must have {size}"
    return None


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints of `run_dir/checkpoints`, oldest first."""
    folders = [p for p in root.iterdir() if NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted((Checkpoint(f) for f in folders if whats_wrong(f) is None), key=lambda c: c.step)


def open_checkpoint(path: str | Path, field: str = "checkpoint") -> Checkpoint:
    """A checkpoint folder, or the newest complete one of a run folder or its `checkpoints` folder.

    Raises: ValueError naming `field` where there is none, FileNotFoundError where there is no such folder.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{field}={path}: no such folder")
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.name):
        if wrong := whats_wrong(path):
            raise ValueError(f"{field}={path}: is no complete checkpoint: {wrong}")
        return Checkpoint(path)
    found = complete_checkpoints(path) or complete_checkpoints(checkpoints_dir(path))
    if not found:
        raise ValueError(f"{field}={path}: holds no complete checkpoint")
    return found[-1]


def choose(run_dir: str | Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `checkpoint.resume` means; None starts anew.

    Where it names another run's checkpoint, that is only the start: once this run has its own, the newest of them.

    Raises: ValueError for "never", or a checkpoint of this run, where the run folder has newer ones, which would be
        deleted in time or be mistaken for this run's; FileNotFoundError where there is no such folder.
    """
    root = checkpoints_dir(run_dir)
    newest = next(reversed(complete_checkpoints(root)), None)
    if resume == "auto":
        return newest
    chosen = None if resume == "never" else open_checkpoint(resume, "checkpoint.resume")
    if newest is None:
        return chosen
    if chosen is not None and chosen.folder.resolve().parent != root.resolve():
        return newest
    if chosen is None or chosen.step < newest.step:
        newer = f"{root} holds {newest.folder.name}; delete what is newer, or take another run_dir"
        raise ValueError(f"checkpoint.resume={resume}: {newer}")
    return chosen


def commit(temporary: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Give a folder whose files are all on the disk its name."""
    write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in {temporary, *((temporary / name).parent for name in manifest["files"])}:
        flush_folder(folder)
    replaced = hidden(target, "replaced")
    if target.exists():  # the same step of an earlier attempt
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    temporary.rename(target)
    flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    for checkpoint in complete_checkpoints(root)[:-keep]:
        delete(checkpoint.folder)


def delete(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that none is ever half there."""
    old = hidden(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def clean(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted, and put back what it was about to replace."""
    for path in list(root.iterdir()) if root.is_dir() else ():
        match = HIDDEN.fullmatch(path.name)
        if match and match[2] == "replaced" and not (root / match[1]).exists():
            path.rename(root / match[1])
        elif match:
            shutil.rmtree(path, ignore_errors=True)


def write_config(run_dir: Path, text: str) -> None:
    """The resolved config of a run, beside its checkpoints; whole, or as it was."""
    part = run_dir / f".{CONFIG}.part"
    part.write_text(text, encoding="utf-8")
    part.replace(run_dir / CONFIG)


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        flush_file(file)


def flush_file(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
