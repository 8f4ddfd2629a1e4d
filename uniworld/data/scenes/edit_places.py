"""Changes of where things stand: new things, moves, and two that change places."""

import dataclasses

from uniworld.data.scenes.descriptions import RELATIONS, attributes_of, describe
from uniworld.data.scenes.edit_steps import HELD_OUT_RATE, Change, Step, altered, same, target
from uniworld.data.scenes.graph import FLOOR_DEPTH, FLOOR_HALF_WIDTH, Scene, Thing, footprint_radius
from uniworld.data.scenes.sampling import is_clear, sample_thing
from uniworld.data.scenes.typical import YAW, typical_place
from uniworld.data.scenes.wording import Wording

SHIFTS = (0.5, 0.6, 0.45, 0.7, 0.4, 0.8, 0.35, 0.9, 1.0)  # of x or z, the first that leaves the scene clear
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "back": (0, 1)}  # of x and z
GAPS = (0.15, 0.3, 0.5, 0.8, 1.2)  # world units between a thing and the one it is put beside


def add_step(scene: Scene, words: Wording, split: str, _: frozenset[int]) -> Step | None:
    thing = sample_thing(words.rng, held_out=split != "train" and words.chance(HELD_OUT_RATE))
    thing = dataclasses.replace(thing, yaw=YAW, pose=())
    names = ["shape", "colour", *(["material"] if thing.material != "matte" else [])]
    new = words.a(attributes_of(thing, names + (["size"] if thing.size != "medium" else [])))
    index, origins = len(scene.things), (*same(scene), None)
    way = words.pick(("add", "add_side", "add_by"))
    if way == "add_by" and scene.things:
        near = words.pick(range(index))
        relation, the = words.pick(tuple(RELATIONS)), describe(scene, near, words.rng)
        after = beside(thing, relation, scene.things[near], scene.plus(thing), index) if the else None
        if after is None:
            return None
        slots = {"a": new, "relation": words.word("RELATIONS", relation), "the": words.the(the)}
        change = Change(kind="add", after=index, value=relation, other=near)
        return Step(after=after, change=change, origins=origins, section="add_by", slots=slots, about=((near, the),))
    side = words.pick(("left", "middle", "right", "front", "back")) if way == "add_side" else ""
    placed = typical_place(scene, thing, side)
    if placed is None:
        return None
    slots = {"a": new} | ({"side": words.word("SIDES", side)} if side else {})
    change = Change(kind="add", after=index, value=side)
    section = "add_side" if side else "add"
    return Step(after=scene.plus(placed), change=change, origins=origins, section=section, slots=slots)


def move_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    if the is None:
        return None
    old, way = scene.things[index], words.pick(tuple(DIRECTIONS))
    dx, dz = DIRECTIONS[way]
    for shift in SHIFTS:
        x, z = old.x + dx * shift, old.z + dz * shift
        if -1 <= x <= 1 and 0 <= z <= 1 and is_clear(scene.with_thing(index, x=x, z=z).things):
            return altered(scene, index, the, words, "move", f"move {way}", way, {"x": x, "z": z})
    return None


def move_by_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    others = [i for i in same(scene) if i != index and i not in blocked]
    if the is None or not others:
        return None
    near, relation = words.pick(others), words.pick(tuple(RELATIONS))
    the_2 = describe(scene, near, words.rng)
    if the_2 is None or RELATIONS[relation](scene.things[index], scene.things[near]):
        return None
    after = beside(scene.things[index], relation, scene.things[near], scene, index)
    if after is None:
        return None
    slots = {
        "the_1": words.the(the),
        "the_2": words.the(the_2),
        "relation": words.word("RELATIONS", relation),
    }
    change = Change(kind="move_by", before=index, after=index, value=relation, other=near)
    about = ((index, the), (near, the_2))
    return Step(after=after, change=change, origins=same(scene), section="move_by", slots=slots, about=about)


def swap_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    others = [i for i in same(scene) if i != index and i not in blocked]
    if the is None or not others:
        return None
    other = words.pick(others)
    the_2 = describe(scene, other, words.rng)
    a, b = scene.things[index], scene.things[other]
    if the_2 is None or _looks(a) == _looks(b):
        return None
    after = scene.with_thing(index, x=b.x, z=b.z).with_thing(other, x=a.x, z=a.z)
    if not is_clear(after.things):
        return None
    change = Change(kind="swap", before=index, after=index, other=other)
    slots = {"the_1": words.the(the), "the_2": words.the(the_2)}
    about = ((index, the), (other, the_2))
    return Step(after=after, change=change, origins=same(scene), section="swap", slots=slots, about=about)


def beside(thing: Thing, relation: str, other: Thing, scene: Scene, index: int) -> Scene | None:
    """The scene in which things[index], which is `thing`, stands close to another in this relation, clear of all."""
    way = {"left of": (-1, 0), "right of": (1, 0), "in front of": (0, -1), "behind": (0, 1)}[relation]
    reach = footprint_radius(thing) + footprint_radius(other)
    places = []
    for space in GAPS:
        x = other.x + way[0] * (reach + space) / FLOOR_HALF_WIDTH
        z = other.z + way[1] * (reach + space) / FLOOR_DEPTH
        places += [(x, z), (x, z + 0.15), (x, z - 0.15)] if way[0] else [(x, z), (x + 0.2, z), (x - 0.2, z)]
    for x, z in places:
        if -1 <= x <= 1 and 0 <= z <= 1:
            moved = scene.with_thing(index, x=x, z=z)
            if RELATIONS[relation](moved.things[index], other) and is_clear(moved.things):
                return moved
    return None


def _looks(thing: Thing) -> tuple:
    return thing.shape, thing.colour, thing.material, thing.size, thing.yaw, thing.pose
