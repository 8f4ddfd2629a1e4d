"""Compositions of two pictures: something of the second goes into the first."""

import dataclasses
from collections.abc import Callable

import numpy as np

from uniworld.data.scenes.descriptions import describe
from uniworld.data.scenes.edit_steps import Change, allowed
from uniworld.data.scenes.edits import MAX_TRIES, Edit, draw_key, kept_things
from uniworld.data.scenes.graph import STYLES, Scene
from uniworld.data.scenes.sampling import is_clear, sample_scene
from uniworld.data.scenes.typical import typical_place
from uniworld.data.scenes.wording import Wording, wording


def make_composition(rng: np.random.Generator, *, split: str = "train", language: str = "en") -> Edit:
    """A composition of two fresh scenes; what is put or copied is `about[-1]` of the second."""
    words = wording(language, rng)
    kind = draw_key({kind: weight for kind, (weight, _) in COMPOSITIONS.items()}, rng)
    for _ in range(MAX_TRIES):
        first = _sample(rng, split, (1, 2, 3))
        second = _sample(rng, split, (1, 1, 2, 3))
        edit = COMPOSITIONS[kind][1](first, second, words, split)
        if edit is not None:
            return dataclasses.replace(edit, language=language)
    raise RuntimeError(f"no composition {kind} in {MAX_TRIES} pairs of scenes")


def _sample(rng: np.random.Generator, split: str, numbers: tuple[int, ...]) -> Scene:
    scene = sample_scene(rng, split=split, num_things=int(rng.choice(numbers)))
    return dataclasses.replace(scene, style="photo")


def _put(first: Scene, second: Scene, words: Wording, _: str) -> Edit | None:
    """The thing keeps its place where that is free."""
    index = words.pick(range(len(second.things)))
    thing, the = second.things[index], describe(second, index, words.rng)
    placed = thing if is_clear((*first.things, thing)) else typical_place(first, thing, "")
    if the is None or placed is None:
        return None
    change = Change(kind="add", after=len(first.things))
    slots = {"the": words.the(the)}
    return _edit(first, second, first.plus(placed), "put", change, ((index, the),), slots, words)


def _replace(first: Scene, second: Scene, words: Wording, _: str) -> Edit | None:
    index, other = (words.pick(range(len(scene.things))) for scene in (first, second))
    the_1, the_2 = describe(first, index, words.rng), describe(second, other, words.rng)
    old, new = first.things[index], second.things[other]
    if the_1 is None or the_2 is None or (old.shape, old.colour) == (new.shape, new.colour):
        return None
    things = list(first.things)
    things[index] = dataclasses.replace(new, x=old.x, z=old.z)
    after = dataclasses.replace(first, things=tuple(things))
    if not is_clear(after.things):
        return None
    change = Change(kind="replace", before=index, after=index, value=f"{new.colour} {new.shape}")
    slots = {"the_1": words.the(the_1), "the_2": words.the(the_2)}
    return _edit(first, second, after, "replace", change, ((index, the_1), (other, the_2)), slots, words)


def _background(first: Scene, second: Scene, words: Wording, _: str) -> Edit | None:
    if first.background == second.background:
        return None
    after = dataclasses.replace(first, background=second.background, seed=second.seed)
    change = Change(kind="background", value=second.background)
    return _edit(first, second, after, "background", change, (), {}, words)


def _colour(first: Scene, second: Scene, words: Wording, split: str) -> Edit | None:
    index, other = (words.pick(range(len(scene.things))) for scene in (first, second))
    the_1 = describe(first, index, words.rng)
    the_2 = describe(second, other, words.rng, without=("colour",))
    old, value = first.things[index], second.things[other].colour
    if the_1 is None or the_2 is None or old.colour == value or not allowed(old.shape, value, split):
        return None
    change = Change(kind="colour", before=index, after=index, value=value)
    slots = {"the_1": words.the(the_1), "the_2": words.the(the_2)}
    about = ((index, the_1), (other, the_2))
    return _edit(first, second, first.with_thing(index, colour=value), "colour", change, about, slots, words)


def _style(first: Scene, second: Scene, words: Wording, _: str) -> Edit | None:
    value = words.pick([style for style in STYLES if style != "photo"])
    second = dataclasses.replace(second, style=value)
    after = dataclasses.replace(first, style=value)
    return _edit(first, second, after, "style", Change(kind="style", value=value), (), {}, words)


# Kind -> how often it is made, and what makes it.
COMPOSITIONS: dict[str, tuple[float, Callable[[Scene, Scene, Wording, str], Edit | None]]] = {
    "put": (4, _put),
    "replace": (2, _replace),
    "background": (1.5, _background),
    "colour": (1.5, _colour),
    "style": (1, _style),
}


def _edit(
    first: Scene,
    second: Scene,
    after: Scene,
    section: str,
    change: Change,
    about: tuple,
    slots: dict[str, str],
    words: Wording,
) -> Edit:
    origins = (*range(len(first.things)), *([None] * (len(after.things) - len(first.things))))
    return Edit(
        kind="compose",
        language="",
        instruction=words.sentence(words.fill(f"compose {section}", **slots)),
        before=first,
        after=after,
        second=second,
        changes=(change,),
        kept=kept_things(origins, (change,)),
        about=about,
        parts=tuple(slots.items()),
    )
