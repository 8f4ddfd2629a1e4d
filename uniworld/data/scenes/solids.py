"""From things to the tables that the ray caster reads: solids, things, footprints, dots and planes.

Each row of a table is one item; the columns are named below, for `tracing.py` and `csrc/scene_render.cpp` alike.
"""

import math
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes import camera, doll
from uniworld.data.scenes.graph import COLOURS, MATERIALS, Scene, Thing

ELLIPSOID, PLANES, CYLINDER, CONE, TORUS = range(5)

# Columns of `solids`: kind, its thing, centre, rows of its axes, its sizes, bounding sphere, picture bounds
# (left, right, top, bottom from -1 to 1), brightness, and its rows of `planes`.
KIND, THING, CENTRE, AXES, DIMS, BALL, BALL_RADIUS, BOUNDS, TONE, PLANE_START, PLANE_COUNT = (
    0, 1, slice(2, 5), slice(5, 14), slice(14, 17), slice(17, 20), 20, slice(21, 25), 25, 26, 27,
)  # fmt: skip
NUM_SOLID_COLUMNS = 28
# Columns of `things`: linear colour, second colour of its pattern, material, bounding sphere, whether it shades
# itself, stripe direction and offset, its rows of `dots`, the radius of its ambient shade, its nominal radius.
COLOUR, SECOND, MATERIAL, HULL, HULL_RADIUS = slice(0, 3), slice(3, 6), 6, slice(7, 10), 10
SHADES_ITSELF, STRIPE, STRIPE_OFFSET, DOT_START, DOT_COUNT, SHADE, SCALE = 11, slice(12, 15), 15, 16, 17, 18, 19
NUM_THING_COLUMNS = 20
# Columns of `feet`, the rounded rectangles that darken the floor: thing, middle X and Z, cos and sin of the turn, half
# sizes, rounding radius, fall-off length, strength.
NUM_FOOT_COLUMNS = 10

STRIPES_PER_RADIUS = 1.15
DARK_TONE, LIGHT_TONE = 0.30, 0.20  # of the second colour: times the colour, or where the colour is dark, mixed white


@dataclass(frozen=True)
class Tables:
    """All float64. solids [S, 28], things [T, 20], feet [F, 10], dots [D, 4] (centre, squared radius), planes [P, 4]
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
    build = _Builder()
    for index, thing in enumerate(scene.things):
        build.add(index, thing)
    return build.finish()


def box_planes(a: float, b: float, c: float) -> list[tuple[float, ...]]:
    """Planes (outward normal, offset) of a box of half sizes a, b, c."""
    return [(1, 0, 0, a), (-1, 0, 0, a), (0, 1, 0, b), (0, -1, 0, b), (0, 0, 1, c), (0, 0, -1, c)]


def pyramid_planes(a: float, h: float) -> list[tuple[float, ...]]:
    """Planes of a pyramid with a square base of half size a at y = 0 and its tip at y = h."""
    s = math.sqrt(a * a + h * h)
    up, out, offset = a / s, h / s, a * h / s
    return [(out, up, 0, offset), (-out, up, 0, offset), (0, up, out, offset), (0, up, -out, offset), (0, -1, 0, 0)]


def turn(yaw: float) -> np.ndarray:
    """Rows: the axes in the world of a thing turned by yaw degrees about the vertical."""
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def fibonacci(num: int) -> np.ndarray:
    """Evenly spread points [num, 3] on the unit ball."""
    i = np.arange(num) + 0.5
    y = 1 - 2 * i / num
    angle = math.pi * (3 - math.sqrt(5)) * i
    r = np.sqrt(1 - y * y)
    return np.stack([r * np.cos(angle), y, r * np.sin(angle)], 1)


def ring(num: int, radius: float, y: float, phase: float = 0.0) -> np.ndarray:
    """Points [num, 3] on a horizontal circle."""
    angle = 2 * math.pi * (np.arange(num) + phase) / num
    return np.stack([radius * np.cos(angle), np.full(num, y), radius * np.sin(angle)], 1)


class _Builder:
    def __init__(self):
        self.solids, self.things, self.feet, self.dots, self.planes, self.joints = [], [], [], [], [], {}

    def finish(self) -> Tables:
        def table(rows, columns):
            return np.array(rows, np.float64).reshape(len(rows), columns)

        return Tables(
            table(self.solids, NUM_SOLID_COLUMNS),
            table(self.things, NUM_THING_COLUMNS),
            table(self.feet, NUM_FOOT_COLUMNS),
            table(self.dots, 4),
            table(self.planes, 4),
            self.joints,
        )

    def add(self, index: int, thing: Thing) -> None:
        self.index, self.thing, self.radius = index, thing, thing.radius
        self.axes = turn(thing.yaw)
        x, z = thing.place
        self.origin = np.array([x, 0.0, z])
        self.first_solid, self.first_dot = len(self.solids), len(self.dots)
        getattr(self, f"_{thing.shape}")()
        self._thing_row()

    def _solid(self, kind, centre, dims, ball, ball_radius, axes=None, tone=1.0, planes=()) -> None:
        """Centre and bounding ball in the thing's own axes and units of its radius; axes relative to the thing's."""
        r = self.radius
        own = self.axes if axes is None else axes @ self.axes
        middle, hull = self.origin + r * (centre @ self.axes), self.origin + r * (ball @ self.axes)
        row = np.empty(NUM_SOLID_COLUMNS)
        row[KIND], row[THING], row[CENTRE], row[AXES] = kind, self.index, middle, own.ravel()
        row[DIMS], row[BALL], row[BALL_RADIUS] = np.multiply(dims, r), hull, ball_radius * r * 1.0001
        row[BOUNDS] = camera.sphere_bounds(hull, ball_radius * r * 1.0001)
        row[TONE], row[PLANE_START], row[PLANE_COUNT] = tone, len(self.planes), len(planes)
        self.planes += [(*plane[:3], plane[3] * r) for plane in planes]
        self.solids.append(row)

    def _dots(self, points: np.ndarray, radius: float) -> None:
        world = self.origin + self.radius * (points @ self.axes)
        self.dots += [(*point, (radius * self.radius) ** 2) for point in world]

    def _foot(self, x, z, half_x, half_z, rounding, falloff, strength) -> None:
        r = self.radius
        middle = self.origin + r * (np.array([x, 0.0, z]) @ self.axes)
        cos, sin = self.axes[0, 0], self.axes[2, 0]
        self.feet.append(
            (self.index, middle[0], middle[2], cos, sin, half_x * r, half_z * r, rounding * r, falloff * r, strength)
        )

    def _thing_row(self) -> None:
        thing, solids = self.thing, np.array(self.solids[self.first_solid :])
        row = np.empty(NUM_THING_COLUMNS)
        colour = linear(COLOURS[thing.colour])
        dark = float(colour @ (0.2126, 0.7152, 0.0722)) < 0.06
        row[COLOUR] = colour
        row[SECOND] = colour + LIGHT_TONE * (1 - colour) if dark else colour * DARK_TONE
        row[MATERIAL] = MATERIALS.index(thing.material)
        low = (solids[:, BALL] - solids[:, BALL_RADIUS, None]).min(0)
        high = (solids[:, BALL] + solids[:, BALL_RADIUS, None]).max(0)
        row[HULL] = (low + high) / 2
        row[HULL_RADIUS] = (np.linalg.norm(solids[:, BALL] - row[HULL], axis=1) + solids[:, BALL_RADIUS]).max()
        row[SHADES_ITSELF] = thing.shape in ("doll", "torus")
        direction = np.array([0.0, 1.0, 0.0]) if thing.shape != "torus" else self.axes[0]
        row[STRIPE] = direction * (STRIPES_PER_RADIUS / self.radius)
        row[STRIPE_OFFSET] = 100.25 - float(row[STRIPE] @ self.origin)
        row[DOT_START], row[DOT_COUNT] = self.first_dot, len(self.dots) - self.first_dot
        row[SHADE] = self.radius * 0.9
        row[SCALE] = self.radius
        self.things.append(row)

    def _ball(self) -> None:
        middle = np.array([0.0, 1.0, 0.0])
        self._solid(ELLIPSOID, middle, (1, 1, 1), middle, 1.0)
        self._dots(middle + fibonacci(24), 0.24)
        self._foot(0, 0, 0, 0, 0.05, 0.95, 0.75)

    def _cube(self) -> None:
        a = 0.80
        middle = np.array([0.0, a, 0.0])
        self._solid(PLANES, middle, (a, a, a), middle, a * math.sqrt(3), planes=box_planes(a, a, a))
        square = [(-0.5, -0.5), (0.5, -0.5), (0, 0), (-0.5, 0.5), (0.5, 0.5)]
        faces = [np.roll([sign, u, v], axis) for axis in range(3) for sign in (-1, 1) for u, v in square]
        self._dots(middle + a * np.array(faces), 0.19)
        self._foot(0, 0, a, a, 0.0, 0.4, 0.55)

    def _cylinder(self) -> None:
        r, h = 0.74, 0.86
        middle = np.array([0.0, h, 0.0])
        self._solid(CYLINDER, middle, (r, h, r), middle, math.hypot(r, h))
        rows = [ring(7, r, y, phase) for y, phase in ((0.3, 0.0), (0.86, 0.5), (1.42, 0.0))]
        self._dots(np.concatenate([*rows, ring(4, r * 0.58, 2 * h, 0.5)]), 0.19)
        self._foot(0, 0, 0, 0, r, 0.4, 0.55)

    def _cone(self) -> None:
        r, h = 0.92, 1.95
        reach = (h * h + r * r) / (2 * h)  # the sphere through the tip and the base's rim
        self._solid(CONE, np.zeros(3), (r, h, r), np.array([0.0, h - reach, 0.0]), reach)
        rows = [(8, 0.22, 0.0), (6, 0.72, 0.5), (4, 1.2, 0.0), (2, 1.62, 0.5)]
        self._dots(np.concatenate([ring(n, r * (1 - y / h), y, phase) for n, y, phase in rows]), 0.17)
        self._foot(0, 0, 0, 0, r, 0.4, 0.5)

    def _torus(self) -> None:
        major, minor = 0.69, 0.31
        middle = np.array([0.0, major + minor, 0.0])
        self._solid(TORUS, middle, (major, minor, 0), middle, major + minor)
        around = ring(10, major, 0.0)[:, [0, 2, 1]]
        outer = ring(10, major + minor, 0.0, 0.5)[:, [0, 2, 1]]
        faces = [around + (0, 0, minor), around - (0, 0, minor), outer]
        self._dots(middle + np.concatenate(faces), 0.14)
        self._foot(0, 0, 0.25, 0.02, 0.06, 0.55, 0.65)

    def _pyramid(self) -> None:
        a, h = 0.90, 1.75
        reach = (h * h + 2 * a * a) / (2 * h)
        centre, ball = np.zeros(3), np.array([0.0, h - reach, 0.0])
        self._solid(PLANES, centre, (a, h, a), ball, reach, planes=pyramid_planes(a, h))
        spots = [(-0.56, 0.16), (0.0, 0.16), (0.56, 0.16), (-0.28, 0.48), (0.28, 0.48), (0.0, 0.8)]
        dots = [(side * a * (1 - y / h), y, u) for u, y in spots for side in (-1, 1)]
        self._dots(np.array(dots + [(u, y, x) for x, y, u in dots]), 0.16)
        self._foot(0, 0, a, a, 0.0, 0.35, 0.5)

    def _doll(self) -> None:
        parts, joints = doll.build(self.thing.pose)
        for part in parts:
            self._solid(
                ELLIPSOID, part.centre, part.radii, part.centre, max(part.radii), axes=part.axes, tone=part.tone
            )
            if part.tone == 1.0:
                spread = fibonacci(14 if min(part.radii) > 0.2 else 8) * part.radii
                self._dots(part.centre + spread @ part.axes, 0.085)
            if part.centre[1] - max(part.radii) < 0.1 and part.tone == 1.0:
                self._foot(part.centre[0], part.centre[2], 0.05, 0.1, 0.1, 0.45, 0.5)
        self.joints[self.index] = self.origin + self.radius * (joints @ self.axes)
