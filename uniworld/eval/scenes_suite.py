"""Runs a model over the items of the columns. Every answer is kept on disk at once, so that a run can go on.

answers/COLUMN/000012.png   a picture, with the seed of its noise
answers/COLUMN/000012.json  {"answer": ...} or {"draw_probability": ...}, with the item's seed
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from uniworld.data.scenes.make import VERSION, write_whole
from uniworld.data.scenes.tasks import Item
from uniworld.engine import Engine, Request
from uniworld.eval.scenes_columns import SUITE, Column, item_of, question_index
from uniworld.models.prompts import IMAGE_MARK

SETTINGS = "run.json"
ANSWER_TOKENS = 24
CHUNK_BATCHES = 4  # of pictures that are asked for at a time


@dataclass(frozen=True, kw_only=True)
class SuitePlan:
    """What is asked, and how. Two plans that are equal ask the same; `num` items a column are no part of that.

    steps, edit_steps: without and with pictures.
    """

    model: str
    seed: int = 0
    steps: int = 28
    edit_steps: int = 28
    guidance: float = 3.5
    size_px: int = 128
    version: str = f"{VERSION}.{SUITE}"


def open_folder(plan: SuitePlan, folder: Path) -> None:
    """Make the folder, or check that it holds answers of this plan.

    Raises: ValueError where it holds others.
    """
    path = folder / SETTINGS
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for name, value in asdict(plan).items():
            if there.get(name) != value:
                raise ValueError(f"{folder}: holds answers for {name}={there.get(name)!r}, not {value!r}; take another")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is neither empty nor a folder of scores")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(plan), indent=2))


def answer_path(folder: Path, column: Column, index: int) -> Path:
    return folder / "answers" / column.slug / f"{index:06d}{'.png' if column.draws else '.json'}"


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def answer_all(
    engine: Engine,
    plan: SuitePlan,
    columns: Sequence[Column],
    num: int,
    folder: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Have the model answer `num` items of each column that are not answered yet.

    Args:
        progress: told the column's name, its answers so far, and how many there will be.
    """
    for column in columns:
        waiting = [i for i in range(num) if not answer_path(folder, column, i).exists()]
        chunk = CHUNK_BATCHES * engine.scheduler.max_batch_size if column.draws else 1
        for start in range(0, len(waiting), chunk):
            if progress is not None:
                progress(column.name, num - len(waiting) + start, num)
            _ANSWERS[column.draws](engine, plan, column, waiting[start : start + chunk], folder)
        if progress is not None:
            progress(column.name, num, num)


def save_picture(path: Path, picture: Image.Image, seed: int) -> None:
    """Write a picture and the seed of its noise, in one move."""
    note = PngInfo()
    note.add_text("seed", str(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".partial")
    picture.save(part, "PNG", pnginfo=note)
    os.replace(part, path)


def save_answer(path: Path, answer: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(answer, ensure_ascii=False))


def _draw(engine: Engine, plan: SuitePlan, column: Column, indices: Sequence[int], folder: Path) -> None:
    requests = []
    for index in indices:
        item = item_of(column, plan.seed, index, plan.size_px)
        given = item.pictures[:-1] if column.group != "t2i" else ()
        requests.append(
            Request(
                prompt=said(item, 0),
                images=tuple(Image.fromarray(picture) for picture in given),
                height=plan.size_px,
                width=plan.size_px,
                num_inference_steps=plan.edit_steps if given else plan.steps,
                guidance_scale=plan.guidance,
                seed=(plan.seed << 32) + index,
            )
        )
    for index, result in zip(indices, engine.run(requests)):
        save_picture(answer_path(folder, column, index), result.images[0], result.seed)


def _talk(engine: Engine, plan: SuitePlan, column: Column, indices: Sequence[int], folder: Path) -> None:
    for index in indices:
        item = item_of(column, plan.seed, index, plan.size_px)
        if column.group == "understanding":
            messages = conversation(item, question_index(item))
            reply = engine.chat(messages, mode="text", max_new_tokens=ANSWER_TOKENS)
            answer = {"answer": reply.text}
        else:  # only the decision counts: what follows is kept short
            settings = {"num_inference_steps": 1, "height": plan.size_px, "width": plan.size_px, "seed": 0}
            reply = engine.chat(conversation(item, 0), mode="auto", max_new_tokens=1, **settings)
            answer = {"draw_probability": reply.draw_probability}
        save_answer(answer_path(folder, column, index), answer | {"seed": item.seed})


def conversation(item: Item, turn: int) -> list[dict[str, Any]]:
    """The messages up to a question, the right answers to the earlier ones among them."""
    pictures = item.pictures if item.task == "understanding" else item.pictures[:-1]
    messages = []
    for i in range(turn + 1):
        shown = pictures if i == 0 and item.task != "t2i" else ()
        parts = [{"type": "image", "image": Image.fromarray(picture)} for picture in shown]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": said(item, i)}]})
        if i < turn:
            messages.append({"role": "assistant", "content": item.conversations[2 * i + 1]["value"]})
    return messages


def said(item: Item, turn: int) -> str:
    return item.conversations[2 * turn]["value"].replace(IMAGE_MARK, "").strip()


_ANSWERS = {True: _draw, False: _talk}
