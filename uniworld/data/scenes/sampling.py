"""Random scenes in which footprints never overlap and everything can be seen."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from uniworld.data.scenes import camera
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    POSES,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    check_choice,
    footprint_radius,
    gap,
    is_held_out,
)
from uniworld.data.scenes.render import visible_shares

MIN_VISIBLE = 0.6  # of each thing's pixels
MIN_GAP = 0.08  # world units between footprints
MAX_THINGS = 5
PLACES_TRIED, LAYOUTS_TRIED = 40, 60


class NoRoomError(ValueError):
    """The things do not fit on the floor beside each other."""


def sample_scene(
    rng: np.random.Generator,
    *,
    split: str = "train",
    num_things: int | None = None,
    things: Sequence[Thing] | None = None,
    background: str | None = None,
    light: str | None = None,
    style: str = "photo",
) -> Scene:
    """A random scene; what is given is kept.

    Args:
        rng: all that is random comes from it.
        split: "train" has no held-out pair of shape and colour; "held-out" has at least one (if `things` is not given).
        num_things: 1 to 5.
        things: the things to show, of which only the places are drawn.

    Raises:
        ValueError: an unknown split or name, or more than 5 things; NoRoomError where given things do not fit.
    """
    check_choice("split", split, SPLITS)
    num = int(rng.integers(1, MAX_THINGS + 1)) if num_things is None else num_things
    if not 1 <= num <= MAX_THINGS:
        raise ValueError(f"num_things={num}: must be from 1 to {MAX_THINGS}")
    background = background or _pick(rng, BACKGROUNDS)
    light = light or _pick(rng, LIGHTS)
    seed = 2 * int(rng.integers(1 << 20)) + SPLITS.index(split)
    last = None
    for _ in range(LAYOUTS_TRIED):
        try:
            placed = arrange(rng, things if things is not None else sample_things(rng, num, split=split))
        except NoRoomError as error:
            last = error
            continue
        return Scene(things=placed, background=background, light=light, style=style, seed=seed)
    raise last


def sample_things(rng: np.random.Generator, num: int, *, split: str = "train") -> list[Thing]:
    """Random things without a place (all in the middle). Of the held-out split at least one is a held-out pair."""
    chosen = int(rng.integers(num)) if split == "held-out" else -1
    return [sample_thing(rng, held_out=i == chosen or (split == "held-out" and rng.random() < 0.2)) for i in range(num)]


def sample_thing(rng: np.random.Generator, *, held_out: bool = False) -> Thing:
    """One random thing in the middle, whose shape and colour are a held-out pair, or are not."""
    pairs = _pairs(held_out)
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    return Thing(
        shape=shape,
        colour=colour,
        material=_pick(rng, MATERIALS),
        size=_pick(rng, SIZES),
        yaw=sample_yaw(rng, shape),
        pose=POSES[_pick(rng, tuple(POSES))] if shape == "doll" else (),
    )


@lru_cache(maxsize=2)
def _pairs(held_out: bool) -> list[tuple[str, str]]:
    return [(shape, colour) for shape in SHAPES for colour in COLOURS if is_held_out(shape, colour) == held_out]


def sample_yaw(rng: np.random.Generator, shape: str) -> float:
    """Degrees: dolls and rings about face the camera, the rest stand as they come."""
    limit = {"doll": 25.0, "torus": 40.0}.get(shape, 45.0)
    return round(float(rng.uniform(-limit, limit)), 1)


def arrange(rng: np.random.Generator, things: Sequence[Thing], keep: Sequence[Thing] = ()) -> tuple[Thing, ...]:
    """Places for `things`, so that nothing overlaps, leaves the picture or hides another; `keep` stand where they are.

    Returns:
        The things with new x and z, in their order, without `keep`.

    Raises:
        NoRoomError: no such places were found.
    """
    for _ in range(LAYOUTS_TRIED):
        placed = _drop(rng, things, keep)
        if placed is not None and is_clear((*keep, *placed)):
            return tuple(placed)
    raise NoRoomError(f"things: no room for {len(things)} beside {len(keep)} others")


def is_clear(things: Sequence[Thing]) -> bool:
    """Whether no footprints overlap, everything is in the picture, and at least 60 % of each thing is visible."""
    if not all(in_picture(thing) for thing in things):
        return False
    if any(gap(a, b) < 0 for i, a in enumerate(things) for b in things[:i]):
        return False
    return bool((visible_shares(Scene(things=tuple(things))) >= MIN_VISIBLE + 0.03).all())


def in_picture(thing: Thing) -> bool:
    """Whether the thing is inside the left and right edge of the picture."""
    x, z = thing.place
    radius = footprint_radius(thing)
    return abs(x) + radius <= camera.visible_half_width(z)


def _drop(rng: np.random.Generator, things: Sequence[Thing], keep: Sequence[Thing]) -> list[Thing] | None:
    """Random places without overlap, or None. Large footprints are dropped first."""
    order = sorted(range(len(things)), key=lambda i: -footprint_radius(things[i]))
    placed: dict[int, Thing] = {}
    for i in order:
        for _ in range(PLACES_TRIED):
            x, z = (round(float(rng.uniform(low, 1)), 3) for low in (-1, 0))
            thing = dataclasses.replace(things[i], x=x, z=z)
            others = (*keep, *placed.values())
            if in_picture(thing) and all(gap(thing, other) >= MIN_GAP for other in others):
                placed[i] = thing
                break
        else:
            return None
    return [placed[i] for i in range(len(things))]


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]
