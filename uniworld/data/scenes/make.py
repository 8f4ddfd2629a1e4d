"""Makes data sets of scenes: tar shards, the authors' layout, or both from the same pictures.

The items of a task are numbered and cut into shards; every shard is made on its own from (seed, number), so that the
bytes depend neither on the number of processes nor on what was there before. A shard that has its name is complete.
"""

import io
import json
import multiprocessing
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from uniworld.data.reader import prepare_to_fork
from uniworld.data.scenes.graph import SPLITS, check_choice
from uniworld.data.scenes.render import check_size
from uniworld.data.scenes.tasks import KIND_WEIGHTS, MIXTURE, SIZE_PX, make_item

FORMATS = ("both", "webdataset", "authors")
CHAT = "understanding"  # its items have no target picture and are no training samples of the DiT
SHARD_ITEMS = 500
MANIFEST = "data.json"
VERSION = 3  # of what is drawn and said: another one makes other data of the same seed
PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What to make. Two plans that are equal make the same files."""

    num: int
    """Items in all."""
    split: str = "train"
    seed: int = 0
    tasks: tuple[str, ...] = tuple(MIXTURE)
    """Those of MIXTURE, in whose proportions the items are shared."""
    kinds: tuple[str, ...] = ()
    """Those that items are drawn of; a task of which none is named has all of its own."""
    size_px: int = SIZE_PX
    format: str = "both"

    def __post_init__(self):
        check_choice("split", self.split, SPLITS)
        check_choice("format", self.format, FORMATS)
        check_size(self.size_px)
        if self.num < 1:
            raise ValueError(f"num={self.num}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={','.join(self.tasks)}: must name each task once")
        for task in self.tasks:
            check_choice("task", task, tuple(MIXTURE))
        of_tasks = tuple(kind for task in self.tasks for kind in KIND_WEIGHTS.get(task, ()))
        for kind in self.kinds:
            check_choice("kind", kind, of_tasks)

    @property
    def counts(self) -> dict[str, int]:
        """Items of each task: its share of `num`, the largest remainders rounded up."""
        total = sum(MIXTURE[task] for task in self.tasks)
        exact = {task: self.num * MIXTURE[task] / total for task in self.tasks}
        counts = {task: int(share) for task, share in exact.items()}
        by_remainder = sorted(self.tasks, key=lambda task: counts[task] - exact[task])
        for task in by_remainder[: self.num - sum(counts.values())]:
            counts[task] += 1
        return counts

    def shards(self) -> list["Shard"]:
        return [
            Shard(task=task, number=number, first=first, end=min(first + SHARD_ITEMS, count))
            for task, count in self.counts.items()
            for number, first in enumerate(range(0, count, SHARD_ITEMS))
        ]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The items `first` to `end` of a task."""

    task: str
    number: int
    first: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.number:05d}"

    def tar(self, folder: Path) -> Path:
        return folder / ("chat" if self.task == CHAT else "shards") / f"{self.name}.tar"

    def images(self, folder: Path) -> Path:
        return folder / "images" / self.name

    def annotations(self, folder: Path) -> Path:
        return folder / "annotations" / f"{self.name}.json"


def make_data(
    plan: DataPlan,
    folder: Path,
    *,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make what is not there yet; returns how many items that were.

    Args:
        num_workers: processes; 1 works in this one.
        progress: called with (items there, items in all).

    Raises:
        ValueError: the folder holds something else, or data of another plan.
        OSError: it cannot be written.
    """
    if num_workers < 1:
        raise ValueError(f"workers={num_workers}: must be at least 1")
    open_folder(plan, folder)
    shards = plan.shards()
    missing = [shard for shard in shards if not _is_complete(shard, plan, folder)]
    done, made = sum(shard.end - shard.first for shard in shards if shard not in missing), 0
    if progress is not None:
        progress(done, plan.num)
    try:
        for shard in _run(missing, plan, folder, num_workers):
            made += shard.end - shard.first
            if progress is not None:
                progress(done + made, plan.num)
    except OSError as error:
        raise OSError(f"{folder}: {done + made} of {plan.num} items are there, then: {error}") from error
    if plan.format != "webdataset":
        _join_annotations(plan, shards, folder)
    return made


def results(plan: DataPlan, folder: Path) -> list[Path]:
    """What `check-data` and training take; of "understanding" alone, its conversations."""
    drawn = any(count for task, count in plan.counts.items() if task != CHAT)
    tars, texts = (folder / "shards", folder / "data.txt") if drawn else (folder / "chat", joined(CHAT, folder))
    return {"webdataset": [tars], "authors": [texts], "both": [tars, texts]}[plan.format]


def make_shard(shard: Shard, plan: DataPlan, folder: Path) -> Shard:
    """Make one shard; its files get their names when they are complete."""
    images, annotations, tar_path = shard.images(folder), shard.annotations(folder), shard.tar(folder)
    with_tar, with_files = plan.format != "authors", plan.format != "webdataset"
    records = []
    if with_files:
        shutil.rmtree(_hidden(images), ignore_errors=True)
        _hidden(images).mkdir()
    with tarfile.open(_hidden(tar_path), "w") if with_tar else nullcontext() as tar:
        for number in range(shard.first, shard.end):
            item = make_item(shard.task, (plan.seed, number), plan.split, kinds=plan.kinds, size_px=plan.size_px)
            pictures = [png(picture) for picture in item.pictures]
            record = {"id": f"{plan.split}-{plan.seed}-{shard.task}-{number:07d}"} | item.record()
            if with_tar:
                _add_to_tar(tar, f"{number:07d}", record, pictures)
            if with_files:
                names = [f"{number:07d}.{place}.png" for place in range(len(pictures))]
                for name, data in zip(names, pictures):
                    (_hidden(images) / name).write_bytes(data)
                records.append({"image": [f"{shard.name}/{name}" for name in names]} | record)
    if with_tar:
        _hidden(tar_path).replace(tar_path)
    if with_files:
        shutil.rmtree(images, ignore_errors=True)
        _hidden(images).rename(images)
        write_whole(annotations, json.dumps(records, ensure_ascii=False))
    return shard


def png(picture: np.ndarray) -> bytes:
    """An RGB picture, uint8 [H, W, 3], as PNG: the fastest of OpenCV's ways that is also among the smallest here."""
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), PNG_OPTIONS)
    if not done:
        raise ValueError(f"picture: shape {picture.shape} cannot be encoded")
    return data.tobytes()


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    _hidden(path).write_text(text, encoding="utf-8")
    _hidden(path).replace(path)


def joined(task: str, folder: Path) -> Path:
    """The annotations of all shards of a task."""
    return folder / "annotations" / f"{task}.json"


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def open_folder(plan: DataPlan, folder: Path) -> None:
    """Make the folders, or see that they are of the same plan. Raises as `make_data` does."""
    manifest = folder / MANIFEST
    # Folders that were made before there was a choice of kinds have none, and go on.
    fields = {name: value for name, value in asdict(plan).items() if name != "kinds" or value}
    text = json.dumps({"version": VERSION, **fields, "counts": plan.counts}, indent=1)
    if manifest.is_file():
        stored = manifest.read_text(encoding="utf-8")
        if stored != text:
            raise ValueError(f"{folder}: holds other data ({_first_difference(stored, text)}); name another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and has no {MANIFEST}; name a new folder")
    for path in {path for shard in plan.shards() for path in _files(shard, plan, folder)}:
        path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(manifest, text)


def _first_difference(stored: str, text: str) -> str:
    try:
        there = json.loads(stored)
    except json.JSONDecodeError:
        return f"{MANIFEST} is not JSON"
    asked = json.loads(text)
    keys = (key for key in asked | there if there.get(key) != asked.get(key))
    return next((f"{key}={there.get(key)}, asked for {asked.get(key)}" for key in keys), f"{MANIFEST} differs")


def _files(shard: Shard, plan: DataPlan, folder: Path) -> list[Path]:
    paths = [shard.tar(folder)] if plan.format != "authors" else []
    return paths if plan.format == "webdataset" else [*paths, shard.images(folder), shard.annotations(folder)]


def _is_complete(shard: Shard, plan: DataPlan, folder: Path) -> bool:
    all_joined = joined(shard.task, folder).is_file()
    return all(
        path.exists() or (all_joined and path == shard.annotations(folder)) for path in _files(shard, plan, folder)
    )


def _run(shards: Sequence[Shard], plan: DataPlan, folder: Path, num_workers: int) -> Iterator[Shard]:
    """Make the shards, here or in processes; yields each when it is complete."""
    if num_workers == 1 or len(shards) < 2:
        for shard in shards:
            yield make_shard(shard, plan, folder)
        return
    prepare_to_fork()
    pool = ProcessPoolExecutor(min(num_workers, len(shards)), multiprocessing.get_context("fork"))
    waiting, running = list(reversed(shards)), set()
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:  # no more: what is queued would run on after Ctrl-C
                running.add(pool.submit(make_shard, waiting.pop(), plan, folder))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _add_to_tar(tar: tarfile.TarFile, key: str, record: dict, pictures: Sequence[bytes]) -> None:
    members = [(f"{key}.json", json.dumps(record, ensure_ascii=False).encode())]
    members += [(f"{key}.{place}.png", data) for place, data in enumerate(pictures)]
    for name, data in members:
        info = tarfile.TarInfo(name)  # without owner and time, which would differ from run to run
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _join_annotations(plan: DataPlan, shards: Sequence[Shard], folder: Path) -> None:
    """One list of annotations a task in place of one a shard, and `data.txt` with those that are trained on."""
    for task in plan.tasks:
        pieces = [shard.annotations(folder) for shard in shards if shard.task == task]
        if pieces and not joined(task, folder).is_file():
            texts = [piece.read_text(encoding="utf-8")[1:-1] for piece in pieces]
            write_whole(joined(task, folder), "[" + ",\n".join(texts) + "]")
        for piece in pieces:
            piece.unlink(missing_ok=True)
    lines = [f"images,annotations/{task}.json,true\n" for task, n in plan.counts.items() if n and task != CHAT]
    if lines:
        write_whole(folder / "data.txt", "".join(lines))
