"""What words leave open, in one typical way: "a cone" is an orange one in the middle of a studio.

A small model draws in few steps, and what its words do not settle it draws as the mean of all that it has seen: of
things that stand anywhere, a haze. So pictures for prompts, and places of things that are added, are the same wherever
the same is asked for. A picture that is right in another way is judged right all the same.
"""

import dataclasses
import math
from functools import cache

from uniworld.data.scenes.captions import Prompt
from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import FLOOR_DEPTH, FLOOR_HALF_WIDTH, Scene, Thing, gap
from uniworld.data.scenes.sampling import MIN_GAP, is_clear

COLOUR_OF = {  # none of these pairs is held out
    "ball": "red",
    "cube": "blue",
    "cylinder": "green",
    "cone": "orange",
    "torus": "yellow",
    "pyramid": "cyan",
    "doll": "purple",
}
BACKGROUND, LIGHT, TEXTURE = "studio", "left", 0  # TEXTURE: the seed of a scene whose background is drawn anew
YAW = 20.0  # degrees: of a cube two sides are seen
# Of things whose size no word tells: the first of these in which all are clear, by how many there are.
SIZES_OF_FEW, SIZES_OF_MANY, MANY = ("large", "medium"), ("medium",), 3
# x and z of so many things, in the order in which they are named; the first layout in which all are clear.
LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    1: (((0.0, 0.35),),),
    2: (((-0.65, 0.4), (0.65, 0.4)),),
    3: (((-0.65, 0.4), (0.0, 0.4), (0.65, 0.4)), ((-0.7, 0.6), (0.0, 0.05), (0.7, 0.6))),
    4: (((-0.4, 0.1), (0.4, 0.1), (-0.8, 0.8), (0.8, 0.8)), ((-0.5, 0.1), (0.5, 0.1), (-1.0, 0.9), (1.0, 0.9))),
    5: (((-0.45, 0.1), (0.45, 0.1), (-0.95, 0.8), (0.0, 0.8), (0.95, 0.8)),),
}
LEFT_AND_RIGHT = LAYOUTS[2]
FRONT_AND_BACK = (((-0.35, 0.1), (0.4, 0.8)), ((-0.4, 0.1), (0.6, 0.9)))
# Of the things in the order of the prompt: where the first and the second stand.
LAYOUTS_OF_RELATIONS = {
    "left of": LEFT_AND_RIGHT,
    "right of": tuple(layout[::-1] for layout in LEFT_AND_RIGHT),
    "in front of": FRONT_AND_BACK,
    "behind": tuple(layout[::-1] for layout in FRONT_AND_BACK),
}
# Where a new thing is put, by the side that is named, "" for none: here or as near to it as there is room.
SPOTS = {
    "": (0.0, 0.4),
    "left": (-0.65, 0.4),
    "middle": (0.0, 0.4),
    "right": (0.65, 0.4),
    "front": (0.0, 0.1),
    "back": (0.0, 0.8),
}
STEP = 0.1  # of x and z, between the places that are tried
# Of x and z: where "on the left" and the like are true of a thing, by `graph.column` and `graph.row`.
REGIONS = {
    "": ((-1, 1), (0, 1)),
    "left": ((-1, -0.41), (0, 1)),
    "middle": ((-0.31, 0.31), (0, 1)),
    "right": ((0.41, 1), (0, 1)),
    "front": ((-1, 1), (0, 0.39)),
    "back": ((-1, 1), (0.61, 1)),
}


def typical_thing(said: Description, size: str = "medium") -> Thing:
    """A thing in the middle of which this is true, of this size unless another is said.

    Raises: ValueError where no shape is said.
    """
    if said.shape is None:
        raise ValueError(f"said={said}: must name a shape")
    return Thing(
        shape=said.shape,
        colour=said.colour or COLOUR_OF[said.shape],
        material=said.material or "matte",
        size=said.size or size,
        yaw=YAW,
    )


def typical_scene(prompt: Prompt) -> Scene | None:
    """The scene for a prompt; None where its things do not stand clear of each other in any layout."""
    said = [want.description for want in prompt.wants for _ in range(want.number)]
    few = len(said) < MANY and all(description.size is None for description in said)
    for size in SIZES_OF_FEW if few else SIZES_OF_MANY:
        placed = _laid_out([typical_thing(description, size) for description in said], prompt.relation)
        if placed is not None:
            return Scene(
                things=placed,
                background=prompt.background or BACKGROUND,
                light=LIGHT,
                style=prompt.style or "photo",
                seed=TEXTURE,
            )
    return None


def _laid_out(things: list[Thing], relation: str | None) -> tuple[Thing, ...] | None:
    for layout in LAYOUTS_OF_RELATIONS[relation] if relation else LAYOUTS[len(things)]:
        placed = tuple(dataclasses.replace(thing, x=x, z=z) for thing, (x, z) in zip(things, layout))
        if is_clear(placed):
            return placed
    return None


def typical_place(scene: Scene, thing: Thing, side: str) -> Thing | None:
    """The thing at the free place of this side that is nearest to its spot; None where none is free."""
    for x, z in places(side):
        placed = dataclasses.replace(thing, x=x, z=z)
        apart = all(gap(placed, other) >= MIN_GAP for other in scene.things)
        if apart and is_clear((*scene.things, placed)):
            return placed
    return None


@cache
def places(side: str) -> tuple[tuple[float, float], ...]:
    """x and z of a grid about the side's spot, within its region, the nearest to the spot first."""
    (x_0, z_0), ((left, right), (near, far)) = SPOTS[side], REGIONS[side]
    steps = range(-round(2 / STEP), round(2 / STEP) + 1)
    grid = [(round(x_0 + STEP * i, 3), round(z_0 + STEP * k, 3)) for k in steps for i in steps]
    found = [(x, z) for x, z in grid if left <= x <= right and near <= z <= far]

    def distance(place: tuple[float, float]) -> float:  # world units
        return math.hypot((place[0] - x_0) * FLOOR_HALF_WIDTH, (place[1] - z_0) * FLOOR_DEPTH)

    return tuple(sorted(found, key=lambda place: (round(distance(place), 6), place)))
