"""Scenes for text-to-image prompts of every kind."""

import dataclasses

import numpy as np

from uniworld.data.scenes.captions import Prompt, prompt_of
from uniworld.data.scenes.descriptions import RELATIONS
from uniworld.data.scenes.edit_steps import allowed
from uniworld.data.scenes.graph import COLOURS, STYLES, Scene, Thing
from uniworld.data.scenes.sampling import NoRoomError, sample_scene, sample_thing, sample_things
from uniworld.data.scenes.typical import typical_scene
from uniworld.data.scenes.wording import Wording

KIND_WEIGHTS = {
    "single object": 0.7,
    "two objects": 1.0,
    "counting": 1.5,
    "colors": 1.0,
    "position": 1.5,
    "attribute binding": 1.5,
    "caption": 4.0,
}
COUNTS = (2, 3, 4)
STYLE_RATES = {"caption": 0.25}
STYLE_RATE = 0.08  # of the other kinds
ALIKE_RATE = 0.5  # of things to count, that have one colour


def make_prompt(kind: str, rng: np.random.Generator, words: Wording, split: str, language: str) -> tuple[Scene, Prompt]:
    """A prompt of this kind, and the typical one of the scenes that it is true of, if there is one."""
    while True:
        style = words.pick(STYLES) if words.chance(STYLE_RATES.get(kind, STYLE_RATE)) else "photo"
        try:
            scene = sample_scene(rng, split=split, things=_things(kind, rng, words, split), style=style)
        except NoRoomError:
            continue
        if kind != "position" or any(holds(*scene.things) for holds in RELATIONS.values()):
            prompt = prompt_of(kind, scene, words, language)
            return typical_scene(prompt) or scene, prompt


def _things(kind: str, rng: np.random.Generator, words: Wording, split: str) -> list[Thing] | None:
    """Things of which a prompt of this kind can be true; None for any."""
    if kind == "caption":
        return None
    if kind in ("single object", "colors"):
        return sample_things(rng, 1, split=split)
    if kind == "counting":
        return _alike(rng, words, split)
    while True:
        first, second = sample_things(rng, 2, split=split)
        if first.shape != second.shape and (kind != "attribute binding" or first.colour != second.colour):
            return [first, second]


def _alike(rng: np.random.Generator, words: Wording, split: str) -> list[Thing]:
    """Two to four things of one shape and size."""
    thing = sample_thing(rng, held_out=split != "train")
    number = words.pick(COUNTS)
    if number == max(COUNTS) and thing.size == "large":
        thing = dataclasses.replace(thing, size="medium")
    if words.chance(ALIKE_RATE):
        return [thing] * number
    colours = [colour for colour in COLOURS if allowed(thing.shape, colour, split)]
    others = [dataclasses.replace(thing, colour=words.pick(colours)) for _ in range(number - 1)]
    return [thing, *others]
