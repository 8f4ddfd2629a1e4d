"""From things to the tables that the ray caster reads: solids, things, feet, dots and planes, in world units.

Each row of a table is one item; the columns are named below, for `tracing.py` and `csrc/scene_render.cpp` alike.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from uniworld.data.scenes import camera
from uniworld.data.scenes.graph import COLOURS, MATERIALS, Scene, Thing
from uniworld.data.scenes.shapes import Shape, shape_of

# Columns of `solids`: kind, its thing, centre, rows of its axes, its sizes, bounding sphere, picture bounds
# (left, right, top, bottom from -1 to 1), brightness, and its rows of `planes`.
KIND, THING, CENTRE, AXES, DIMS, BALL, BALL_RADIUS = 0, 1, slice(2, 5), slice(5, 14), slice(14, 17), slice(17, 20), 20
BOUNDS, TONE, PLANE_START, PLANE_COUNT, NUM_SOLID_COLUMNS = slice(21, 25), 25, 26, 27, 28
# Columns of `things`: linear colour, second colour of its pattern, material, bounding sphere, whether it shades
# itself, stripe direction and offset, its rows of `dots`, the radius of its ambient shade, its nominal radius, its
# rows of `solids`.
COLOUR, SECOND, MATERIAL, HULL, HULL_RADIUS = slice(0, 3), slice(3, 6), 6, slice(7, 10), 10
SHADES_ITSELF, STRIPE, STRIPE_OFFSET, DOT_START, DOT_COUNT, SHADE, SCALE = 11, slice(12, 15), 15, 16, 17, 18, 19
SOLID_START, SOLID_COUNT, NUM_THING_COLUMNS = 20, 21, 22
# Columns of `feet`, rounded rectangles: thing, middle X and Z, cos and sin of the turn, half sizes, rounding, fall-off
# length, strength.
NUM_FOOT_COLUMNS = 10

# Columns of each table.
WIDTHS = {
    "solids": NUM_SOLID_COLUMNS,
    "things": NUM_THING_COLUMNS,
    "feet": NUM_FOOT_COLUMNS,
    "dots": 4,
    "planes": 4,
}

STRIPES_PER_RADIUS = 1.15
DARK_TONE, LIGHT_TONE = 0.34, 0.20  # of the second colour: times the colour, or where the colour is dark, mixed white


@dataclass(frozen=True)
class Tables:
    """All float64. solids [S, 28], things [T, 22], feet [F, 10], dots [D, 4] (centre, squared radius), planes [P, 4]
    (normal, offset), and for each doll by its index its joints [14, 3] in the world."""

    solids: np.ndarray
    things: np.ndarray
    feet: np.ndarray
    dots: np.ndarray
    planes: np.ndarray
    joints: dict[int, np.ndarray]


def linear(rgb) -> np.ndarray:
    """sRGB 0..255 to linear light 0..1."""
    v = np.asarray(rgb, np.float64) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def tables(scene: Scene) -> Tables:
    """The tables of all things of a scene, in their order."""
    found = [_rows_of(thing) for thing in scene.things]
    counts = {name: [len(getattr(rows, name)) for rows in found] for name in WIDTHS}
    starts = {name: np.cumsum([0, *counts[name][:-1]]) for name in ("solids", "dots", "planes")}
    joined = {
        name: np.concatenate([np.empty((0, width)), *(getattr(rows, name) for rows in found)])
        for name, width in WIDTHS.items()
    }
    if found:
        numbers = np.arange(len(found))
        joined["solids"][:, THING] = np.repeat(numbers, counts["solids"])
        joined["solids"][:, PLANE_START] += np.repeat(starts["planes"], counts["solids"])
        joined["feet"][:, 0] = np.repeat(numbers, counts["feet"])
        joined["things"][:, DOT_START], joined["things"][:, SOLID_START] = starts["dots"], starts["solids"]
    joints = {index: rows.joints for index, rows in enumerate(found) if rows.joints is not None}
    return Tables(joints=joints, **joined)


@dataclass(frozen=True)
class _Rows:
    """The rows of one thing, as if it were the only one; joints [14, 3] of a doll."""

    solids: np.ndarray
    things: np.ndarray
    feet: np.ndarray
    dots: np.ndarray
    planes: np.ndarray
    joints: np.ndarray | None


@lru_cache(maxsize=1024)
def _rows_of(thing: Thing) -> _Rows:
    """Kept, for most scenes that are drawn one after the other differ in one thing."""
    shape, place = shape_of(thing.shape, thing.pose), _Place(thing)
    dots = _dot_rows(shape, place) if thing.material == "dotted" else np.empty((0, 4))
    joints = None if shape.joints is None else place.points(shape.joints)
    planes = shape.planes * (1.0, 1.0, 1.0, thing.radius)
    solids, row, feet = _solid_rows(shape, place), _thing_row(thing, shape, place), _foot_rows(shape, place)
    rows = _Rows(solids, row[None], feet, dots, planes, joints)
    for array in vars(rows).values():
        if array is not None:
            array.flags.writeable = False
    return rows


def thing_points(thing: Thing, points) -> np.ndarray:
    """Points [N, 3] of a thing's shape, at radius 1 about the origin, in the world where the thing stands."""
    return _Place(thing).points(np.asarray(points, np.float64))


class _Place:
    """Where a thing stands: its turned axes (rows, in the world), the middle of its footprint, its radius."""

    def __init__(self, thing: Thing):
        cos, sin = math.cos(math.radians(thing.yaw)), math.sin(math.radians(thing.yaw))
        self.axes = np.array([[cos, 0.0, -sin], [0.0, 1.0, 0.0], [sin, 0.0, cos]])
        x, z = thing.place
        self.origin, self.radius = np.array([x, 0.0, z]), thing.radius

    def turn(self, v: np.ndarray) -> np.ndarray:
        """Directions [..., 3] in the world. Sums are written out: a matrix product may round as the machine likes."""
        return v[..., 0:1] * self.axes[0] + v[..., 1:2] * self.axes[1] + v[..., 2:3] * self.axes[2]

    def points(self, p: np.ndarray) -> np.ndarray:
        return self.origin + self.radius * self.turn(p)


def _solid_rows(shape: Shape, place: _Place) -> np.ndarray:
    rows = np.empty((len(shape.kinds), NUM_SOLID_COLUMNS))
    rows[:, KIND], rows[:, THING], rows[:, TONE] = shape.kinds, 0, shape.tones
    rows[:, CENTRE], rows[:, BALL] = place.points(shape.centres), place.points(shape.balls)
    rows[:, AXES] = place.turn(shape.axes).reshape(-1, 9)
    rows[:, DIMS], rows[:, BALL_RADIUS] = shape.dims * place.radius, shape.ball_radii * place.radius
    rows[:, BOUNDS] = camera.sphere_bounds(rows[:, BALL], rows[:, BALL_RADIUS])
    rows[:, PLANE_START] = np.cumsum(shape.plane_counts) - shape.plane_counts
    rows[:, PLANE_COUNT] = shape.plane_counts
    return rows


def _foot_rows(shape: Shape, place: _Place) -> np.ndarray:
    rows = np.empty((len(shape.feet), NUM_FOOT_COLUMNS))
    middle = np.zeros((len(shape.feet), 3))
    middle[:, 0::2] = shape.feet[:, 0:2]
    rows[:, 0], rows[:, 1:3] = 0, place.points(middle)[:, 0::2]
    rows[:, 3], rows[:, 4] = place.axes[0, 0], place.axes[2, 0]
    rows[:, 5:9], rows[:, 9] = shape.feet[:, 2:6] * place.radius, shape.feet[:, 6]
    return rows


def _dot_rows(shape: Shape, place: _Place) -> np.ndarray:
    radius = shape.spot_radius * place.radius
    return np.concatenate([place.points(shape.spots), np.full((len(shape.spots), 1), radius * radius)], 1)


def _thing_row(thing: Thing, shape: Shape, place: _Place) -> np.ndarray:
    row = np.empty(NUM_THING_COLUMNS)
    row[COLOUR], row[SECOND] = tones(thing.colour)
    row[MATERIAL] = MATERIALS.index(thing.material)
    row[HULL], row[HULL_RADIUS] = place.points(shape.hull), shape.hull_radius * place.radius
    row[SHADES_ITSELF] = shape.shades_itself
    stripe = place.axes[shape.stripe_axis] * (STRIPES_PER_RADIUS / place.radius)
    row[STRIPE] = stripe
    row[STRIPE_OFFSET] = 100.25 - (stripe[0] * place.origin[0] + stripe[2] * place.origin[2])
    row[DOT_START], row[DOT_COUNT] = 0, len(shape.spots) if thing.material == "dotted" else 0
    row[SHADE], row[SCALE] = place.radius * 0.9, place.radius
    row[SOLID_START], row[SOLID_COUNT] = 0, len(shape.kinds)
    return row


@cache
def tones(colour: str) -> tuple[np.ndarray, np.ndarray]:
    """A colour in linear light [3], and the second colour of its stripes and dots."""
    first = linear(COLOURS[colour])
    dark = float(0.2126 * first[0] + 0.7152 * first[1] + 0.0722 * first[2]) < 0.06
    return first, first + LIGHT_TONE * (1 - first) if dark else first * DARK_TONE
