"""How true the scores of `uniworld eval scenes` are: exact answers, wrong ones and spoiled ones are scored.

python bench/scorer.py truth jpeg blur --num 300 --columns t2i,edit
"""

import argparse
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from uniworld.data.scenes.graph import BACKGROUNDS, COLOURS, LIGHTS, SHAPES, STYLES, Scene
from uniworld.data.scenes.perception import draw
from uniworld.data.scenes.render import render
from uniworld.data.scenes.tasks import Item
from uniworld.eval.scenes_columns import Column, chosen, item_of, question_index
from uniworld.eval.scenes_score import judge_all
from uniworld.eval.scenes_suite import answer_path, save_answer, save_picture
from uniworld.eval.scenes_table import rows_of

SEED, SIZE_PX = 0, 128
WHOLE = {"background": BACKGROUNDS, "light": LIGHTS, "style": STYLES}


def truth(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    return item.pictures[-1]


def source(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    """What was given, unchanged; of text to image, the empty scene."""
    if item.task == "t2i":
        return render(dataclasses.replace(item.scenes[0], things=()), SIZE_PX).image
    return item.pictures[0]


def another(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    return other.pictures[-1]


def random(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (SIZE_PX, SIZE_PX, 3), np.uint8)


def altered(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    """The exact picture, but for one thing that was asked for."""
    if item.task == "perceive":
        scene = item.facts.scene
        i = item.facts.target[0] if item.facts.target else 0
        thing = dataclasses.replace(scene.things[i], size="small" if scene.things[i].size != "small" else "large")
        return draw(render(scene.with_thing(i, **vars(thing)), SIZE_PX), item.facts.task, item.facts.target)
    scene = altered_prompt(item, rng) if item.task == "t2i" else altered_edit(item, rng)
    return render(scene, SIZE_PX).image


def altered_prompt(item: Item, rng: np.random.Generator) -> Scene:
    scene, wants = item.scenes[0], item.facts.wants
    if item.kind == "counting":
        return scene.without_thing(0)
    if item.kind == "position":
        a, b = scene.things
        return scene.with_thing(0, x=b.x, z=b.z).with_thing(1, x=a.x, z=a.z)
    index = int(rng.integers(len(scene.things)))
    if wants[0].description.colour is not None:
        return scene.with_thing(index, colour=_unlike(rng, COLOURS, scene.things[index].colour))
    shapes = [shape for shape in SHAPES if all(shape != thing.shape for thing in scene.things)]
    return scene.with_thing(index, shape=str(rng.choice(shapes)), pose=())


def altered_edit(item: Item, rng: np.random.Generator) -> Scene:
    edit = item.facts
    change, scene = edit.changes[0], edit.after
    if change.kind in WHOLE:
        return dataclasses.replace(scene, **{change.kind: _unlike(rng, WHOLE[change.kind], change.value)})
    if change.kind == "remove":
        return edit.before.without_thing((change.before + 1) % len(edit.before.things))
    thing = scene.things[change.after]
    return scene.with_thing(change.after, colour=_unlike(rng, COLOURS, thing.colour))


def _unlike(rng: np.random.Generator, values, value: str) -> str:
    return str(rng.choice([other for other in values if other != value]))


def jpeg(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(item.pictures[-1]).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer))


def blur(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    return cv2.GaussianBlur(item.pictures[-1], (0, 0), 1.0)


def grain(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    return _bytes(item.pictures[-1] + rng.normal(0, 6, item.pictures[-1].shape))


def smooth(item: Item, other: Item, rng: np.random.Generator) -> np.ndarray:
    """As a small VAE leaves it: detail below 2.7 pixels gone by half, edges kept, slow waves of colour."""
    picture = item.pictures[-1]
    small = cv2.resize(picture, (48, 48), interpolation=cv2.INTER_AREA)
    soft = cv2.resize(small, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_CUBIC).astype(np.float64)
    waves = cv2.resize(rng.normal(0, 5, (16, 16, 3)), (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_CUBIC)
    return _bytes(0.5 * soft + 0.5 * cv2.bilateralFilter(picture, 5, 30, 3) + waves)


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


TREATMENTS = {
    "truth": truth,
    "source": source,
    "another": another,
    "random": random,
    "altered": altered,
    "jpeg": jpeg,
    "blur": blur,
    "grain": grain,
    "smooth": smooth,
}
RIGHT = ("truth", "jpeg", "blur", "grain", "smooth")


def write_answers(treatment: str, columns: tuple[Column, ...], num: int, folder: Path) -> None:
    """What a model would have left on disk."""
    rng = np.random.default_rng(1)
    for column in columns:
        items = [item_of(column, SEED, i, SIZE_PX) for i in range(num)]
        for i, item in enumerate(items):
            path, other = answer_path(folder, column, i), items[(i + 1) % num]
            if column.draws:
                save_picture(path, Image.fromarray(TREATMENTS[treatment](item, other, rng)), i)
            elif column.group == "routing":
                asks = (item if treatment in RIGHT else other).task != "understanding"
                save_answer(path, {"draw_probability": float(asks)})
            else:
                answered = item if treatment in RIGHT else other
                save_answer(path, {"answer": answered.facts[question_index(answered)].answer})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("treatments", nargs="+", choices=TREATMENTS)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--columns")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the answers; default: a temporary one")
    options = parser.parse_args()
    columns = chosen(options.columns)
    for treatment in options.treatments:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.keep or Path(temporary)) / treatment
            start = time.perf_counter()
            write_answers(treatment, columns, options.num, folder)
            verdicts = judge_all(columns, options.num, SEED, SIZE_PX, folder, num_workers=options.workers)
        seconds = time.perf_counter() - start
        for row in rows_of(verdicts):
            measures = {name: round(value, 3) for name, value in row.measures.items()}
            print(f"{treatment:8} {row.group:14} {row.name:18} {row.num:5} {row.told():>8}  {measures}", flush=True)
        wrong = [f"{v.column} {v.index}: {v.note}" for v in verdicts if not v.right]
        print(json.dumps({"treatment": treatment, "seconds": round(seconds), "wrong": wrong[:40]}, ensure_ascii=False))


if __name__ == "__main__":
    main()
