"""Single changes of a scene other than of places: what each kind of edit does, and the slots of its instruction.

A step is tried on a scene and gives None where the scene offers nothing for it; its caller then tries again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from uniworld.data.scenes.descriptions import Description, describe
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    PLAIN,
    POSES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    is_held_out,
    pose_name,
)
from uniworld.data.scenes.sampling import is_clear
from uniworld.data.scenes.typical import TEXTURE
from uniworld.data.scenes.wording import Wording

HELD_OUT_RATE = 0.5  # of held-out edits, at least so many change a thing of a held-out pair where one is there


@dataclass(frozen=True, kw_only=True)
class Change:
    """One fact that an edit makes true.

    kind: a key of STEPS in `edits.py`. before, after: which thing it is in the scene before and after, None where it is
    not there or where the change is of the whole picture. value: the new colour, material, size, pose, light,
    background or style, or colour and shape; the direction or relation of a move; the side or relation of an addition,
    or empty. other: index after of the thing that a relation or a swap refers to.
    """

    kind: str
    before: int | None = None
    after: int | None = None
    value: str = ""
    other: int | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A scene after a change.

    origins: of each thing after, its index before, or None if it is new. section, slots: of the template. about: what
    the instruction refers to, as (index before, description).
    """

    after: Scene
    change: Change
    origins: tuple[int | None, ...]
    section: str
    slots: dict[str, str]
    about: tuple[tuple[int, Description], ...] = ()


def allowed(shape: str, colour: str, split: str) -> bool:
    """Whether a thing of this shape and colour may occur."""
    return split != "train" or not is_held_out(shape, colour)


def choose(scene: Scene, words: Wording, split: str, blocked: frozenset[int] = frozenset()) -> int | None:
    """A thing to change, often one of a held-out pair where the split has those."""
    free = [i for i in range(len(scene.things)) if i not in blocked]
    held_out = [i for i in free if is_held_out(scene.things[i].shape, scene.things[i].colour)]
    if split != "train" and held_out and words.chance(HELD_OUT_RATE):
        free = held_out
    return words.pick(free) if free else None


def same(scene: Scene) -> tuple[int, ...]:
    return tuple(range(len(scene.things)))


def remove_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    if the is None or len(scene.things) < 2:
        return None
    origins = tuple(i for i in same(scene) if i != index)
    change = Change(kind="remove", before=index)
    slots = {"the": words.the(the)}
    return Step(
        after=scene.without_thing(index),
        change=change,
        origins=origins,
        section="remove",
        slots=slots,
        about=((index, the),),
    )


def replace_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    if the is None:
        return None
    old = scene.things[index]
    shape = words.pick([shape for shape in SHAPES if shape != old.shape])
    colour = words.pick(tuple(COLOURS)) if words.chance(0.6) else old.colour
    if not allowed(shape, colour, split):
        return None
    names = ("shape",) if colour == old.colour and words.chance(0.7) else ("shape", "colour")
    new = words.a(Description(**{name: {"shape": shape, "colour": colour}[name] for name in names}))
    changes = {"shape": shape, "colour": colour, "pose": ()}
    return altered(scene, index, the, words, "replace", "replace", f"{colour} {shape}", changes, a=new)


def colour_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    values = [colour for colour in COLOURS if allowed(scene.things[index].shape, colour, split)]
    return _become(scene, index, the, words, "colour", "COLOURS", values)


def material_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    return _become(scene, index, the, words, "material", "FINISHES", MATERIALS)


def _become(
    scene: Scene, index: int, the: Description | None, words: Wording, field: str, table: str, values: Sequence[str]
) -> Step | None:
    """A field of a thing becomes another of the values, which the table has words for."""
    if the is None:
        return None
    value = words.pick([value for value in values if value != getattr(scene.things[index], field)])
    word = words.word(table, value)
    slots = {field: word, f"a_{field}": words.article(word)}
    return altered(scene, index, the, words, field, field, value, {field: value}, **slots)


def size_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    """By one step it is made bigger or smaller; a size that is named may be any."""
    index, the = target(scene, words, split, blocked)
    if the is None:
        return None
    old = SIZES.index(scene.things[index].size)
    new = words.pick([i for i in range(len(SIZES)) if i != old])
    by_one = abs(new - old) == 1 and words.chance(0.7)
    section = ("bigger" if new > old else "smaller") if by_one else "size"
    changes = {"size": SIZES[new]}
    size = words.word("SIZES_SAID", SIZES[new])
    return altered(scene, index, the, words, "size", section, SIZES[new], changes, size=size)


def pose_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    dolls = [i for i, thing in enumerate(scene.things) if thing.shape == "doll" and i not in blocked]
    if not dolls:
        return None
    index = words.pick(dolls)
    the = describe(scene, index, words.rng)
    value = words.pick([pose for pose in POSES if pose != pose_name(scene.things[index].pose)])
    if the is None:
        return None
    changes = {"pose": POSES[value]}
    return altered(scene, index, the, words, "pose", "pose", value, changes, pose=words.word("POSES", value))


def extract_step(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> Step | None:
    index, the = target(scene, words, split, blocked)
    if the is None:
        return None
    after = dataclasses.replace(scene, things=(scene.things[index],), background=PLAIN)
    change = Change(kind="extract", before=index, after=0)
    return Step(
        after=after,
        change=change,
        origins=(index,),
        section="extract",
        slots={"the": words.the(the)},
        about=((index, the),),
    )


def background_step(scene: Scene, words: Wording, *_) -> Step | None:
    value = words.pick([name for name in BACKGROUNDS if name != scene.background])
    tables = {"background": "BACKGROUNDS", "background_at": "BACKGROUNDS_AT", "background_to": "BACKGROUNDS_TO"}
    slots = {name: words.word(table, value) for name, table in tables.items()}
    return _whole(dataclasses.replace(scene, seed=TEXTURE), "background", "background", value, slots)


def light_step(scene: Scene, words: Wording, *_) -> Step | None:
    value = words.pick([name for name in LIGHTS if name != scene.light])
    return _whole(scene, "light", f"light {value}", value, {})


def style_step(scene: Scene, words: Wording, *_) -> Step | None:
    value = words.pick([name for name in STYLES if name != scene.style])
    slots = {"style": words.word("STYLES", value), "style_name": words.word("STYLE_NAMES", value)}
    return _whole(scene, "style", "style", value, slots)


def target(scene: Scene, words: Wording, split: str, blocked: frozenset[int]) -> tuple[int, Description | None]:
    index = choose(scene, words, split, blocked)
    return (0, None) if index is None else (index, describe(scene, index, words.rng))


def altered(
    scene: Scene,
    index: int,
    the: Description,
    words: Wording,
    kind: str,
    section: str,
    value: str,
    changes: dict,
    **slots: str,
) -> Step | None:
    """Fields of one thing change; None where it then hides or touches another."""
    after = scene.with_thing(index, **changes)
    if not is_clear(after.things):
        return None
    change = Change(kind=kind, before=index, after=index, value=value)
    said = words.the(the)
    return Step(
        after=after,
        change=change,
        origins=same(scene),
        section=section,
        slots={"the": said, **slots},
        about=((index, the),),
    )


def _whole(scene: Scene, kind: str, section: str, value: str, slots: dict[str, str]) -> Step:
    after = dataclasses.replace(scene, **{kind: value})
    change = Change(kind=kind, value=value)
    return Step(after=after, change=change, origins=same(scene), section=section, slots=slots)
