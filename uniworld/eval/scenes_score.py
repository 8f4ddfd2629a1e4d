"""From an item and an answer to a verdict: one function for each group of columns."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.tasks import Item
from uniworld.eval.scenes_answers import is_right
from uniworld.eval.scenes_columns import Column, item_of, question_index
from uniworld.eval.scenes_edits import judge_edit
from uniworld.eval.scenes_maps import score_map
from uniworld.eval.scenes_reader import read_scene
from uniworld.eval.scenes_suite import answer_path, read_picture

GOOD_MAP = 0.7  # score from which a perception map is called right on the page


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer was judged. score: from 0 to 1; right: as the page shows it. kind: of a question, else "".
    measures: figures by name. note: what was found, in words."""

    column: str
    index: int
    score: float
    right: bool
    kind: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    note: str = ""


def judge_understanding(item: Item, answer: str) -> dict:
    """A short answer must be the expected one, word for word."""
    question = item.facts[question_index(item)]
    right = is_right(answer, question.answer)
    note = f"{question.text} — {answer or '(nothing)'}" + ("" if right else f", not {question.answer}")
    return {"score": float(right), "right": right, "kind": question.kind, "note": note}


def judge_t2i(item: Item, picture: np.ndarray) -> dict:
    """What is read in the picture must be what the prompt asks for."""
    found = read_scene(picture)
    right = item.facts.holds(found.scene)
    return {"score": float(right), "right": right, "note": told(found.scene)}


def judge_edited(item: Item, picture: np.ndarray) -> dict:
    """The asked change must be there, and the rest must be as it was."""
    verdict = judge_edit(item.facts, picture, len(item.pictures[0]))
    measures = {"changed": float(verdict.changed), "stayed": float(verdict.stayed), "inside_db": verdict.inside_db}
    if verdict.psnr_db is not None:
        measures["psnr_db"] = verdict.psnr_db
    kind = "+".join(change.kind for change in item.facts.changes)
    note = "; ".join(verdict.reasons) or "as asked"
    return {"score": float(verdict.success), "right": verdict.success, "kind": kind, "measures": measures, "note": note}


def judge_map(item: Item, picture: np.ndarray) -> dict:
    """The map must be like the exact one."""
    score, measures = score_map(item.facts, picture, len(item.pictures[0]))
    note = ", ".join(f"{name} {value:.3g}" for name, value in measures.items())
    return {"score": score, "right": score >= GOOD_MAP, "measures": measures, "note": note}


def judge_routing(item: Item, draw_probability: float) -> dict:
    """The task head must draw where a picture is asked for, and talk where a question is."""
    right = (draw_probability >= 0.5) == (item.task != "understanding")
    note = f"{item.task}: probability of drawing {draw_probability:.2f}"
    return {"score": float(right), "right": right, "kind": item.task, "note": note}


JUDGES: dict[str, Callable[..., dict]] = {
    "understanding": judge_understanding,
    "t2i": judge_t2i,
    "edit": judge_edited,
    "perceive": judge_map,
    "routing": judge_routing,
}
ANSWER_FIELDS = {"understanding": "answer", "routing": "draw_probability"}


def judge(column: Column, index: int, seed: int, size_px: int, folder: Path) -> Verdict:
    """Judge the answer that is on disk."""
    item, path = item_of(column, seed, index, size_px), answer_path(folder, column, index)
    if column.draws:
        answer = read_picture(path)
    else:
        answer = json.loads(path.read_text(encoding="utf-8"))[ANSWER_FIELDS[column.group]]
    return Verdict(column=column.name, index=index, **JUDGES[column.group](item, answer))


def judge_all(
    columns: Sequence[Column],
    num: int,
    seed: int,
    size_px: int,
    folder: Path,
    *,
    num_workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Verdict]:
    """The verdicts on all answers, in order."""
    tasks = [(column, index, seed, size_px, folder) for column in columns for index in range(num)]
    verdicts = []

    def take(found) -> None:
        for verdict in found:
            verdicts.append(verdict)
            if progress is not None:
                progress("scoring", len(verdicts), len(tasks))

    if num_workers == 1:
        take(judge(*task) for task in tasks)
        return verdicts
    spawn = multiprocessing.get_context("spawn")  # the model's process may hold threads and a GPU
    with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
        take(pool.map(judge, *zip(*tasks), chunksize=8))
    return verdicts


def told(scene: Scene) -> str:
    """A scene in words, as it was read."""
    things = ", ".join(f"{thing.colour} {thing.shape}" for thing in scene.things) or "nothing"
    return f"{things}; {scene.background}"
