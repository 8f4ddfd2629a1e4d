"""One training item of any task, made from a seed: a conversation, its pictures, and the facts a scorer needs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from uniworld.data.masks import THRESHOLD
from uniworld.data.scenes import edits, perception_items, prompts, solids
from uniworld.data.scenes.compositions import make_composition
from uniworld.data.scenes.edits import Edit, draw_key, make_edit
from uniworld.data.scenes.graph import SPLITS, STYLES, Scene, check_choice
from uniworld.data.scenes.questions import converse
from uniworld.data.scenes.render import geometry, render
from uniworld.data.scenes.sampling import sample_scene
from uniworld.data.scenes.wording import Wording, wording
from uniworld.models.prompts import DRAWN_MARK, IMAGE_MARK

SIZE_PX = 128
FOCUS_PX = 64  # of the picture in which the boxes of things are found
LANGUAGE_WEIGHTS = {"en": 2, "zh": 1}
# Task -> its share of a mixture.
MIXTURE = {"understanding": 0.2, "t2i": 0.2, "edit": 0.35, "perceive": 0.15, "compose": 0.05, "keep": 0.05}
KIND_WEIGHTS = {
    "edit": dict.fromkeys(edits.KINDS, 1.0) | {"adjust": 2.0},
    "t2i": prompts.KIND_WEIGHTS,
    "perceive": perception_items.KIND_WEIGHTS,
}
NUM_TURNS = (1, 2, 3, 4)
WHOLE_PICTURE = ("background", "style", "light")  # changes after which no latent counts more than others
# Edits that change less are drawn anew. A region has at least 30 % of what changes, and must be 0.1 % of the picture.
MIN_VISIBLE_SHARE = 0.004
STYLE_RATE = 0.25  # of scenes that are talked about or kept, in another style than a photo


@dataclass(frozen=True, kw_only=True)
class Item:
    """A training item.

    conversations: in the authors' format; the last answer is `<gen_image>`, but of "understanding", which only talks.
    pictures: uint8 [H, W, 3] in the order of their marks, the target last. scenes: what is in them; of a perception
    item, the one scene. facts: the Edit, captions.Prompt, Perception or Questions that it was made of; None of "keep".
    """

    task: str
    kind: str
    language: str
    split: str
    seed: int
    conversations: list[dict[str, str]]
    pictures: tuple[np.ndarray, ...]
    scenes: tuple[Scene, ...]
    facts: Any
    need_weight: bool = True

    def record(self) -> dict:
        """The annotation, without the pictures: `make_item` makes the facts again from task, kind, seed and split."""
        return {
            "conversations": self.conversations,
            "need_weight": self.need_weight,
            "focus": self.focus(),
            "task": self.task,
            "kind": self.kind,
            "language": self.language,
            "split": self.split,
            "seed": self.seed,
        }

    def focus(self) -> list[tuple[float, ...]]:
        """The boxes of the things in the target: left, upper, right, lower as shares of its sides."""
        if self.task == "understanding":
            return []
        ids = geometry(solids.tables(self.scenes[-1]), FOCUS_PX)[0]
        found = (np.nonzero(ids == thing + 1) for thing in range(len(self.scenes[-1].things)))
        edges = ((x.min(), y.min(), x.max() + 1, y.max() + 1) for y, x in found if len(x))
        return [tuple(round(float(edge) / FOCUS_PX, 4) for edge in box) for box in edges]


def make_item(
    task: str,
    seed: int | tuple[int, ...],
    split: str = "train",
    *,
    kind: str | None = None,
    kinds: Collection[str] = (),
    language: str | None = None,
    size_px: int = SIZE_PX,
) -> Item:
    """The item of a task with this seed. The same arguments give the same words and the same pictures.

    Args:
        task: a key of MIXTURE.
        kind: of "edit", "t2i" and "perceive": one of KIND_WEIGHTS[task]; drawn by weight where it is None.
        kinds: those it is drawn of; all of the task's, where none of them is named.
        language: "en" or "zh"; drawn where it is None, two to one.

    Raises: ValueError naming the argument, its value and what is allowed.
    """
    check_choice("task", task, tuple(MIXTURE))
    check_choice("split", split, SPLITS)
    numbers = (seed,) if isinstance(seed, int) else tuple(seed)
    if min(numbers) < 0:
        raise ValueError(f"seed={seed}: must not be negative")
    rng = np.random.default_rng((list(MIXTURE).index(task), SPLITS.index(split), *numbers))
    weights = KIND_WEIGHTS.get(task, {task: 1.0})
    named = {name: weight for name, weight in weights.items() if name in kinds}
    drawn = draw_key(LANGUAGE_WEIGHTS, rng), draw_key(named or weights, rng)
    language, kind = language or drawn[0], kind or drawn[1]
    check_choice("kind", kind, tuple(weights))
    parts = MAKERS[task](kind, rng, wording(language, rng), split, language, size_px)
    return Item(task=task, kind=kind, language=language, split=split, seed=seed, **parts)


def _understanding(kind: str, rng: np.random.Generator, words: Wording, split: str, _: str, size_px: int) -> dict:
    """Questions and answers about one picture, one or several."""
    num_turns, questions = int(rng.choice(NUM_TURNS)), ()
    while not questions:
        scene = _any_scene(rng, words, split)
        questions = converse(scene, words, split, num_turns)
    turns = []
    for question in questions:
        mark = "" if turns else IMAGE_MARK
        turns += [{"from": "human", "value": question.text + mark}, {"from": "gpt", "value": question.answer}]
    picture = render(scene, size_px).image
    return {"conversations": turns, "pictures": (picture,), "scenes": (scene,), "facts": questions}


def _t2i(kind: str, rng: np.random.Generator, words: Wording, split: str, language: str, size_px: int) -> dict:
    scene, prompt = prompts.make_prompt(kind, rng, words, split, language)
    return {
        "conversations": _asked(prompt.text, 0),
        "pictures": (render(scene, size_px).image,),
        "scenes": (scene,),
        "facts": prompt,
        "need_weight": False,
    }


def _edit(kind: str, rng: np.random.Generator, words: Wording, split: str, language: str, size_px: int) -> dict:
    while True:
        parts = _edit_parts(make_edit(kind, rng, split=split, language=language), size_px)
        if visible_share(*parts["pictures"]) >= MIN_VISIBLE_SHARE:
            return parts


def _compose(kind: str, rng: np.random.Generator, words: Wording, split: str, language: str, size_px: int) -> dict:
    """Nothing is weighted: the region is what differs from both pictures, and a thing that is copied does not."""
    parts = _edit_parts(make_composition(rng, split=split, language=language), size_px)
    return parts | {"need_weight": False}


def visible_share(before: np.ndarray, after: np.ndarray) -> float:
    """The share of the pixels whose change `masks.region_mask` sees, of two pictures, uint8 [H, W, 3]."""
    return float((cv2.cvtColor(cv2.absdiff(before, after), cv2.COLOR_RGB2GRAY) >= THRESHOLD).mean())


def _perceive(kind: str, rng: np.random.Generator, words: Wording, split: str, language: str, size_px: int) -> dict:
    made = perception_items.make_perception(kind, rng, words, split)
    return {
        "conversations": _asked(made.instruction, 1),
        "pictures": made.pictures(size_px),
        "scenes": (made.scene,),
        "facts": made,
        "need_weight": False,
    }


def _keep(kind: str, rng: np.random.Generator, words: Wording, split: str, _: str, size_px: int) -> dict:
    """A picture that is to stay as it is: most of every edit is that, and here nothing else has to be learned."""
    scene = _any_scene(rng, words, split)
    picture = render(scene, size_px).image
    return {
        "conversations": _asked(words.sentence(words.order(kind)), 1),
        "pictures": (picture, picture),
        "scenes": (scene,),
        "facts": None,
        "need_weight": False,
    }


def _any_scene(rng: np.random.Generator, words: Wording, split: str) -> Scene:
    style = words.pick(STYLES) if words.chance(STYLE_RATE) else "photo"
    return sample_scene(rng, split=split, style=style)


def _asked(prompt: str, num_references: int) -> list[dict[str, str]]:
    """The words, then the pictures, as a request to the engine has them: so the VLM's states of the pictures, too, know
    what is asked. (The authors' data has the pictures first.)"""
    marks = IMAGE_MARK * num_references
    return [{"from": "human", "value": prompt + marks}, {"from": "gpt", "value": DRAWN_MARK}]


def _edit_parts(edit: Edit, size_px: int) -> dict:
    scenes = tuple(scene for scene in (edit.before, edit.second, edit.after) if scene is not None)
    return {
        "conversations": _asked(edit.instruction, len(scenes) - 1),
        "pictures": tuple(render(scene, size_px).image for scene in scenes),
        "scenes": scenes,
        "facts": edit,
        "need_weight": not any(change.kind in WHOLE_PICTURE for change in edit.changes),
    }


MAKERS: dict[str, Callable[..., dict]] = {
    "understanding": _understanding,
    "t2i": _t2i,
    "edit": _edit,
    "perceive": _perceive,
    "compose": _compose,
    "keep": _keep,
}
