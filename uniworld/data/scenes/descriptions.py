"""Descriptions of things by their attributes, unambiguous in their scene."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes.graph import Scene, Thing, behind, in_front_of, left_of, right_of

ATTRIBUTES = ("shape", "colour", "material", "size")
# Which attributes to name, and how likely that is where they suffice. The natural ones come first.
WAYS = {
    ("shape", "colour"): 10.0,
    ("shape",): 5.0,
    ("colour",): 2.0,
    ("shape", "material"): 2.0,
    ("shape", "size"): 2.0,
    ("shape", "colour", "material"): 1.5,
    ("shape", "colour", "size"): 1.5,
    ("material",): 0.5,
    ("size",): 0.5,
    ("colour", "material"): 0.3,
    ("colour", "size"): 0.3,
    ("shape", "material", "size"): 0.3,
    ("material", "size"): 0.2,
    ("colour", "material", "size"): 0.2,
    ATTRIBUTES: 0.5,
}
DULL, DULL_RATE = {"size": "medium", "material": "matte"}, 0.15  # what is seldom named, and how much less often
RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": left_of,
    "right of": right_of,
    "in front of": in_front_of,
    "behind": behind,
}
EXTREMES = dict(zip(("left", "right", "front", "back"), RELATIONS.values()))


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is said of a thing; None is not said.

    extreme: of the things that the attributes fit, the one that is furthest to the "left", "right", "front" or "back".
    """

    shape: str | None = None
    colour: str | None = None
    material: str | None = None
    size: str | None = None
    extreme: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the attributes are those of the thing, wherever it stands."""
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in ATTRIBUTES)

    def matches(self, scene: Scene) -> tuple[int, ...]:
        """The things meant; an `extreme` that none of them clearly is means nothing."""
        fitting = tuple(i for i, thing in enumerate(scene.things) if self.fits(thing))
        if self.extreme is None:
            return fitting
        beyond = EXTREMES[self.extreme]
        things = scene.things
        return tuple(i for i in fitting if all(i == j or beyond(things[i], things[j]) for j in fitting))


def attributes_of(thing: Thing, names: Collection[str] = ATTRIBUTES) -> Description:
    return Description(**{name: getattr(thing, name) for name in names})


def describe(
    scene: Scene, index: int, rng: np.random.Generator, *, without: Collection[str] = (), place: bool = True
) -> Description | None:
    """A description that only this thing of the scene answers to, by few or many attributes, at random.

    Args:
        without: attributes that must not be named, because they are asked for.
        place: whether "the leftmost" and the like may help.

    Returns:
        None where nothing tells the thing from another.
    """
    thing, alike = scene.things[index], _alike(scene, index)
    ways = [way for way in WAYS if not set(way) & set(without)]
    enough = [way for way in ways if not any(set(way) <= same for same in alike)]
    if enough:
        return attributes_of(thing, _draw_way(enough, thing, rng))
    if not place:
        return None
    found = []
    for way in ways:
        for extreme in EXTREMES:
            description = Description(**{name: getattr(thing, name) for name in way}, extreme=extreme)
            if description.matches(scene) == (index,):
                found.append(description)
    if not found:
        return None
    return found[rng.integers(len(found))]


def _alike(scene: Scene, index: int) -> list[set[str]]:
    """Of every other thing, the attributes that it shares."""
    thing = scene.things[index]
    return [
        {name for name in ATTRIBUTES if getattr(other, name) == getattr(thing, name)}
        for i, other in enumerate(scene.things)
        if i != index
    ]


def _draw_way(ways: list[tuple[str, ...]], thing: Thing, rng: np.random.Generator) -> tuple[str, ...]:
    dull = {name for name, value in DULL.items() if getattr(thing, name) == value}
    weights = np.cumsum([WAYS[way] * (DULL_RATE if dull & set(way) else 1) for way in ways])
    return ways[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
