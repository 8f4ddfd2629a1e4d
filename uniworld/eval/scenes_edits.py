"""Whether an edit happened, and whether the rest stayed.

The scenes before and after are known. So what an edit changed is read by drawing the alternatives, the picture before
among them, and asking which of them the picture is most like: all ten colours for a changed colour, all places of a
grid for a thing that was moved, and so on. A change happened if the one that is most like the picture does what was
asked, and if the picture is clearly nearer to it than to what was before.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes.descriptions import RELATIONS
from uniworld.data.scenes.edit_steps import Change
from uniworld.data.scenes.edits import Edit, edit_mask
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    POSES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    column,
    gap,
    pose_name,
    row,
)
from uniworld.data.scenes.render import picture_of, render
from uniworld.data.scenes.sampling import in_picture
from uniworld.eval.scenes_compare import BACKDROP_SEEDS, difference, fitted, lab, psnr

CLEARLY = 0.75  # of the distance to what was before, at most so much may be left to what was asked
VISIBLE = 3.0  # colour difference between two drawn scenes from which on a pixel tells them apart
STAYED_DB = 20.0  # PSNR outside the edited region, at least
STAYED_DIFFERENCE = 12.0  # mean colour difference where a thing is, at most
FEWEST_PIXELS = 12  # of a thing that is judged
SMALLEST_REST = 0.02  # of the picture, outside the edited region, for a PSNR
MOVED = 0.2  # of floor x or z, in the direction asked for
COARSE_PX = 64  # of pictures in the search for a place
X_PLACES, Z_PLACES = np.linspace(-1, 1, 17), np.linspace(0, 1, 9)
TURNS = (-36.0, -18.0, 0.0, 18.0, 36.0)  # degrees
WHOLE = ("background", "light", "style")


@dataclass(frozen=True, kw_only=True)
class EditVerdict:
    """changed: all that was asked happened. stayed: all else is as before, and all things look as they were read.
    psnr_db: outside the edited region, None where everything is edited. inside_db: within it, to the exact picture,
    which of several right answers is one. read: the scene that the picture is most like, of the alternatives. reasons:
    what is wrong, in words."""

    changed: bool
    stayed: bool
    psnr_db: float | None
    inside_db: float
    read: Scene
    reasons: tuple[str, ...] = ()

    @property
    def success(self) -> bool:
        return self.changed and self.stayed


def judge_edit(edit: Edit, picture: np.ndarray, size_px: int = 128) -> EditVerdict:
    """Judge what was drawn for an edit, uint8 [H, W, 3] of any size; compared at size_px."""
    view = _View(picture, size_px)
    read, reasons = edit.after, []
    for change in edit.changes:
        found, right = _read(edit, change, view)
        read = found if len(edit.changes) == 1 else _merged(read, found, change)
        if not right:
            reasons.append(f"{change.kind}: shows {_told(found, change)}")
        elif not view.clearly(found, undone(edit, change)):
            reasons.append(f"{change.kind}: too near to what was before")
    changed, before, after = not reasons, view.drawn(edit.before), view.drawn(edit.after)
    edited = edit_mask(before, after)
    rest = ~(edited | edit_mask(before, view.drawn(read)))
    decibels = None
    if rest.mean() >= SMALLEST_REST and not any(change.kind in (*WHOLE, "extract") for change in edit.changes):
        decibels = psnr(view.picture, before, rest)
        if decibels < STAYED_DB:
            reasons.append(f"the rest: {decibels:.1f} dB")
    lost = list(_lost(read, view))
    reasons += [f"the {read.things[i].colour} {read.things[i].shape} is not as it should be" for i in lost]
    stayed = not lost and (decibels is None or decibels >= STAYED_DB)
    inside = psnr(view.picture, after, edited)
    return EditVerdict(
        changed=changed, stayed=stayed, psnr_db=decibels, inside_db=inside, read=read, reasons=tuple(reasons)
    )


def undone(edit: Edit, change: Change) -> Scene:
    """The scene after the edit without this change."""
    before, after = edit.before, edit.after
    if change.kind == "extract":
        return before
    if change.kind == "background":
        return dataclasses.replace(after, background=before.background, seed=before.seed)
    if change.kind in WHOLE:
        return dataclasses.replace(after, **{change.kind: getattr(before, change.kind)})
    if change.kind == "add":
        return after.without_thing(change.after)
    if change.kind == "remove":
        return after.plus(before.things[change.before])
    scene = _with(after, change.after, before.things[change.before])
    return _with(scene, change.other, before.things[change.other]) if change.kind == "swap" else scene


class _View:
    """The picture that is judged, and what scenes look like beside it."""

    def __init__(self, picture: np.ndarray, size_px: int):
        self.size_px, self.picture = size_px, fitted(picture, size_px)
        self.fine, self.coarse = lab(self.picture), lab(fitted(self.picture, COARSE_PX))

    def drawn(self, scene: Scene) -> np.ndarray:
        return picture_of(scene, self.size_px)

    def unlike(self, scene: Scene) -> np.ndarray:
        """Colour difference between picture and scene, float32 [H, W]."""
        return difference(self.fine, lab(self.drawn(scene)))

    def nearest(self, scenes: Iterable[Scene]) -> Scene:
        return min(scenes, key=lambda scene: float(self.unlike(scene).sum()))

    def nearest_coarse(self, scenes: Iterable[Scene]) -> Scene:
        return min(scenes, key=lambda scene: float(difference(self.coarse, lab(picture_of(scene, COARSE_PX))).sum()))

    def clearly(self, scene: Scene, other: Scene) -> bool:
        """Whether the picture is clearly nearer to the one than to the other, where these two differ."""
        where = difference(lab(self.drawn(scene)), lab(self.drawn(other))) > VISIBLE
        return not where.any() or self.unlike(scene)[where].sum() <= CLEARLY * self.unlike(other)[where].sum()


def _read(edit: Edit, change: Change, view: _View) -> tuple[Scene, bool]:
    """The alternative that the picture is most like, and whether it does what was asked."""
    if change.kind in ("add", "move", "move_by"):
        return _read_place(edit, change, view)
    before, asked = undone(edit, change), edit.after
    found = view.nearest([asked, before, *ALTERNATIVES[change.kind](edit, change)])
    if change.kind == "background":  # of whatever texture
        return found, found.background == change.value
    if change.kind == "replace" and found != before:  # turned as it likes
        found, index = view.nearest([found, *_turned(found, change.after)]), change.after
        right = (found.things[index].shape, found.things[index].colour)
        return found, right == (asked.things[index].shape, asked.things[index].colour)
    return found, found == asked


def _values(field: str, values: Iterable) -> Callable[[Edit, Change], Iterator[Scene]]:
    def alternatives(edit: Edit, change: Change) -> Iterator[Scene]:
        for value in values:
            if change.kind in WHOLE:
                yield dataclasses.replace(edit.after, **{field: value})
            else:
                yield edit.after.with_thing(change.after, **{field: value})

    return alternatives


def _backgrounds(edit: Edit, _: Change) -> Iterator[Scene]:
    for background in BACKGROUNDS:
        for seed in BACKDROP_SEEDS:
            yield dataclasses.replace(edit.after, background=background, seed=seed)


def _looks(edit: Edit, change: Change) -> Iterator[Scene]:
    """Other shapes in the asked colour and that of before, and other colours of the asked shape."""
    thing, old = edit.after.things[change.after], edit.before.things[change.before]
    for shape in SHAPES:
        for colour in {thing.colour, old.colour}:
            yield edit.after.with_thing(change.after, shape=shape, colour=colour, pose=())
    for colour in COLOURS:
        yield edit.after.with_thing(change.after, colour=colour)


def _removals(edit: Edit, change: Change) -> Iterator[Scene]:
    """Another thing is gone instead."""
    there = undone(edit, change)
    for index in range(len(there.things) - 1):
        yield there.without_thing(index)


def _cut_out(edit: Edit, _: Change) -> Iterator[Scene]:
    """Another thing is cut out, or nothing is there."""
    for thing in edit.before.things:
        yield dataclasses.replace(edit.after, things=(thing,))
    yield dataclasses.replace(edit.after, things=())


def _half_swaps(edit: Edit, change: Change) -> Iterator[Scene]:
    """One of the two is gone."""
    for index in (change.after, change.other):
        yield edit.after.without_thing(index)
        yield edit.before.without_thing(index)


ALTERNATIVES: dict[str, Callable[[Edit, Change], Iterator[Scene]]] = {
    "remove": _removals,
    "replace": _looks,
    "colour": _values("colour", COLOURS),
    "material": _values("material", MATERIALS),
    "size": _values("size", SIZES),
    "light": _values("light", LIGHTS),
    "extract": _cut_out,
    "background": _backgrounds,
    "style": _values("style", STYLES),
    "swap": _half_swaps,
    "pose": _values("pose", POSES.values()),
}


def _read_place(edit: Edit, change: Change, view: _View) -> tuple[Scene, bool]:
    """Of a thing that is new or was moved: its place by a grid, then by smaller steps, and a new one's look."""
    asked, before, index = edit.after, undone(edit, change), change.after
    found = view.nearest_coarse([asked, before, *_placed(asked, index)])
    if found == before:
        return before, False
    for step in (0.06, 0.03, 0.015):
        found = view.nearest([found, *_shifted(found, index, step)])
    if change.kind != "add":
        found = view.nearest([found, before, asked])
        return found, found != before and _is_placed(found, change, edit.before.things[change.before])
    thing = asked.things[index]
    for field, values in (("size", SIZES), ("shape", SHAPES), ("colour", COLOURS), ("material", MATERIALS)):
        plain = {"pose": ()} if field == "shape" else {}
        others = [
            found.with_thing(index, **{field: v}, **plain) for v in values if v != getattr(found.things[index], field)
        ]
        found = view.nearest([found, *others])
    found = view.nearest([found, *_turned(found, index)])
    found = view.nearest([found, before, asked])
    return found, found != before and _is_as_said(found.things[index], thing) and _is_placed(found, change, None)


def _is_as_said(found: Thing, asked: Thing) -> bool:
    """Shape and colour are always said; surface and size only where they are not the usual ones."""
    said = ["shape", "colour", *(["material"] if asked.material != "matte" else [])]
    said += ["size"] if asked.size != "medium" else []
    return all(getattr(found, name) == getattr(asked, name) for name in said)


def _is_placed(scene: Scene, change: Change, old: Thing | None) -> bool:
    """Whether the thing stands where it was asked to: anywhere, on a side, in a relation, or moved in a direction."""
    thing, value = scene.things[change.after], change.value
    if value in RELATIONS:
        return RELATIONS[value](thing, scene.things[change.other])
    if change.kind == "add":
        return not value or value in (column(thing), row(thing))
    along = {"left": old.x - thing.x, "right": thing.x - old.x, "front": old.z - thing.z, "back": thing.z - old.z}
    return along[value] >= MOVED


def _placed(scene: Scene, index: int) -> Iterator[Scene]:
    """The thing at all places of a grid that are free."""
    others = scene.without_thing(index).things
    for x in X_PLACES:
        for z in Z_PLACES:
            thing = dataclasses.replace(scene.things[index], x=float(x), z=float(z))
            if in_picture(thing) and all(gap(thing, other) >= 0 for other in others):
                yield _with(scene, index, thing)


def _shifted(scene: Scene, index: int, step: float) -> Iterator[Scene]:
    thing = scene.things[index]
    for dx, dz in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)):
        x, z = thing.x + dx * step, thing.z + dz * step
        if -1 <= x <= 1 and 0 <= z <= 1:
            yield scene.with_thing(index, x=x, z=z)


def _turned(scene: Scene, index: int) -> Iterator[Scene]:
    for yaw in TURNS:
        yield scene.with_thing(index, yaw=yaw)


def _lost(read: Scene, view: _View) -> Iterator[int]:
    """Things that do not look as they were read, whether they were to stay or to change."""
    shown, unlike = render(read, view.size_px), view.unlike(read)
    for index in range(len(read.things)):
        there = shown.ids == index + 1
        if there.sum() >= FEWEST_PIXELS and unlike[there].mean() > STAYED_DIFFERENCE:
            yield index


def _merged(scene: Scene, found: Scene, change: Change) -> Scene:
    """What was read of one of several changes, put into the scene after the edit."""
    if change.kind == "background":
        return dataclasses.replace(scene, background=found.background, seed=found.seed)
    if change.after is not None and len(found.things) == len(scene.things):
        return _with(scene, change.after, found.things[change.after])
    return scene


def _with(scene: Scene, index: int, thing: Thing) -> Scene:
    return dataclasses.replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def _told(found: Scene, change: Change) -> str:
    """What the picture shows of a change, in words."""
    if change.kind in WHOLE:
        return getattr(found, change.kind)
    if change.after is None or change.after >= len(found.things) or change.kind in ("swap", "extract"):
        return "something else"
    thing = found.things[change.after]
    pose = f", {pose_name(thing.pose)}" if thing.shape == "doll" else ""
    return f"a {thing.size} {thing.material} {thing.colour} {thing.shape}{pose} at x={thing.x:.2f}, z={thing.z:.2f}"
