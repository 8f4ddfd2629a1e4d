"""Edits: a scene before and after, the instruction that leads from one to the other, and what a scorer must know."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.edit_places import add_step, move_by_step, move_step, swap_step
from uniworld.data.scenes.edit_steps import (
    Change,
    Step,
    background_step,
    colour_step,
    extract_step,
    light_step,
    material_step,
    pose_step,
    remove_step,
    replace_step,
    size_step,
    style_step,
)
from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.sampling import NoRoomError, sample_scene, sample_things
from uniworld.data.scenes.wording import Wording, wording

Key = TypeVar("Key")
STEPS: dict[str, Callable[[Scene, Wording, str, frozenset[int]], Step | None]] = {
    "add": add_step,
    "remove": remove_step,
    "replace": replace_step,
    "colour": colour_step,
    "material": material_step,
    "size": size_step,
    "light": light_step,
    "extract": extract_step,
    "background": background_step,
    "style": style_step,
    "move": move_step,
    "move_by": move_by_step,
    "swap": swap_step,
    "pose": pose_step,
}
# ImgEdit's nine kinds, and which steps make one, how often.
KINDS: dict[str, dict[str, float]] = {
    "add": {"add": 1},
    "remove": {"remove": 1},
    "replace": {"replace": 1},
    "adjust": {"colour": 4, "material": 2, "size": 2, "light": 1.5},
    "extract": {"extract": 1},
    "background": {"background": 1},
    "style": {"style": 1},
    "action": {"move": 2, "move_by": 1.5, "swap": 1, "pose": 2},
    "hybrid": {"add": 1, "remove": 1, "replace": 1, "colour": 2, "material": 1, "size": 1, "background": 1, "move": 1},
}
KINDS_OF_THINGS = ("add", "remove", "replace", "adjust", "extract", "action")
NUM_THINGS = {"add": (1, 2, 3, 4), "remove": (2, 3, 4, 5), "hybrid": (2, 3, 4)}  # before; equally likely
DEFAULT_NUM_THINGS = (1, 2, 3, 4)
TO_PHOTO_RATE = 0.1  # of style edits, that start from another style
MAX_TRIES, TRIES_OF_A_SCENE = 1000, 4


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit and its facts.

    kind: one of KINDS, or "compose". before: the picture to edit; second: of a composition, the other picture.
    changes: what the edit makes true, one of most kinds, two of hybrids. kept: the things that stay as they are, as
    (index before, index after). about: what the words refer to, as (index, description); of the second picture where
    `changes` says so. parts: the filled slots of the instruction.
    """

    kind: str
    language: str
    instruction: str
    before: Scene
    after: Scene
    changes: tuple[Change, ...]
    kept: tuple[tuple[int, int], ...]
    about: tuple[tuple[int, Description], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    second: Scene | None = None


def make_edit(kind: str, rng: np.random.Generator, *, split: str = "train", language: str = "en") -> Edit:
    """An edit of a fresh scene. The same generator state gives the same edit.

    Raises: ValueError where `kind` is not one of KINDS.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    words = wording(language, rng)
    names = [draw_key(KINDS[kind], rng)]
    if kind == "hybrid":
        names.append(draw_key({name: w for name, w in KINDS[kind].items() if name != names[0]}, rng))
    for number in range(MAX_TRIES):
        if number % TRIES_OF_A_SCENE == 0:
            before = sample_before(kind, names, rng, split)
        edit = _hybrid(before, names, words, split, language) if kind == "hybrid" else None
        if kind != "hybrid" and (step := STEPS[names[0]](before, words, split, frozenset())):
            edit = _single(kind, before, step, words, language)
        if edit is not None:
            return edit
    raise RuntimeError(f"no {kind} edit of steps {names} in {MAX_TRIES} tries")


def edits_of(before: Scene, words: Wording, number: int, *, split: str = "train", language: str = "en") -> list[Edit]:
    """Other edits of the same scene, of KINDS_OF_THINGS; fewer than `number` where some do not go with it."""
    found = []
    for _ in range(number):
        kind = words.pick(KINDS_OF_THINGS)
        step = STEPS[draw_key(KINDS[kind], words.rng)](before, words, split, frozenset())
        if step is not None:
            found.append(_single(kind, before, step, words, language))
    return found


def edit_mask(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """bool [H, W]: where two renders, uint8 [H, W, 3], differ. Unchanged pixels are equal to the bit."""
    if before.shape != after.shape:
        raise ValueError(f"after: has shape {after.shape}, must be {before.shape} as before")
    return (before != after).any(axis=-1)


def draw_key(weights: dict[Key, float], rng: np.random.Generator) -> Key:
    """A key, drawn by its weight."""
    ends = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


def sample_before(kind: str, names: list[str], rng: np.random.Generator, split: str) -> Scene:
    """A scene that an edit may start from."""
    numbers = NUM_THINGS.get(kind, DEFAULT_NUM_THINGS)
    if set(names) & {"move_by", "swap"}:
        numbers = NUM_THINGS["hybrid"]
    number = int(rng.choice(numbers))
    scene = (with_doll if "pose" in names else sample_scene)(rng, split=split, num_things=number)
    style = "photo"
    if kind == "style" and rng.random() < TO_PHOTO_RATE:
        style = str(rng.choice(("watercolour", "oil painting", "cartoon", "pixel art")))
    return dataclasses.replace(scene, style=style)


def with_doll(rng: np.random.Generator, *, split: str, num_things: int) -> Scene:
    """As `sample_scene`, with a doll among the things."""
    while True:
        things = sample_things(rng, num_things, split=split)
        if any(thing.shape == "doll" for thing in things):
            with suppress(NoRoomError):
                return sample_scene(rng, split=split, things=things)


def kept_things(origins: tuple[int | None, ...], changes: tuple[Change, ...]) -> tuple[tuple[int, int], ...]:
    """The things that no change touches, as (index before, index after)."""
    touched = {change.after for change in changes} | {c.other for c in changes if c.kind == "swap"}
    return tuple((before, after) for after, before in enumerate(origins) if before is not None and after not in touched)


def _single(kind: str, before: Scene, step: Step, words: Wording, language: str) -> Edit:
    return Edit(
        kind=kind,
        language=language,
        instruction=words.sentence(words.order(step.section, **step.slots)),
        before=before,
        after=step.after,
        changes=(step.change,),
        kept=kept_things(step.origins, (step.change,)),
        about=step.about,
        parts=tuple(step.slots.items()),
    )


def _hybrid(before: Scene, names: list[str], words: Wording, split: str, language: str) -> Edit | None:
    """Two edits at once, of different things; None where they do not go together."""
    first = STEPS[names[0]](before, words, split, frozenset())
    if first is None:
        return None
    blocked = frozenset(i for i in (first.change.after, first.change.other) if i is not None)
    second = STEPS[names[1]](first.after, words, split, blocked)
    if second is None:
        return None
    # Both halves are read against the picture before: what the second refers to must be there, and clear.
    about = tuple((first.origins[i], description) for i, description in second.about)
    if any(i is None or description.matches(before) != (i,) for i, description in about):
        return None
    if any(i in blocked for i, _ in second.about):
        return None
    origins = tuple(None if i is None else first.origins[i] for i in second.origins)
    where = {i: after for after, i in enumerate(second.origins) if i is not None}
    change_1 = dataclasses.replace(
        first.change, after=where.get(first.change.after), other=where.get(first.change.other)
    )
    index = second.change.before
    change_2 = dataclasses.replace(second.change, before=None if index is None else first.origins[index])
    halves = [words.order(step.section, joined=True, **step.slots) for step in (first, second)]
    return Edit(
        kind="hybrid",
        language=language,
        instruction=words.sentence(words.fill("hybrid", first=halves[0], second=halves[1])),
        before=before,
        after=second.after,
        changes=(change_1, change_2),
        kept=kept_things(origins, (change_1, change_2)),
        about=first.about + about,
        parts=tuple(
            (f"{name}_{number}", text)
            for number, step in enumerate((first, second), 1)
            for name, text in step.slots.items()
        ),
    )
