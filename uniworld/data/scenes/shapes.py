"""The shapes of things as solids, at radius 1 about the origin of the floor, not turned.

Each is an ellipsoid, a body between planes, a cylinder, a cone or a torus; the doll is many ellipsoids. With each come
the spots of its dotted material and the feet that darken the floor under it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniworld.data.scenes import doll

ELLIPSOID, PLANES, CYLINDER, CONE, TORUS = range(5)


@dataclass(frozen=True)
class Solid:
    """centre, dims [3], rows of axes [3, 3], a ball around it, brightness, planes (normal, offset) of a PLANES."""

    kind: int
    centre: Sequence[float]
    dims: Sequence[float]
    ball: Sequence[float]
    ball_radius: float
    axes: np.ndarray | None = None
    tone: float = 1.0
    planes: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Foot:
    """A rounded rectangle on the floor: its middle, half sizes and rounding; shade falls off from it over a length."""

    x: float
    z: float
    half_x: float
    half_z: float
    rounding: float
    falloff: float
    strength: float


class Shape:
    """Solids and all that goes with them, as arrays. S solids, D dots, F feet, P planes."""

    def __init__(self, solids: Sequence[Solid], spots, spot_radius: float, feet: Sequence[Foot], **more):
        self.kinds = np.array([solid.kind for solid in solids], np.float64)
        self.centres = np.array([solid.centre for solid in solids], np.float64)
        self.dims = np.array([solid.dims for solid in solids], np.float64)
        self.axes = np.array([np.eye(3) if solid.axes is None else solid.axes for solid in solids])
        self.balls = np.array([solid.ball for solid in solids], np.float64)
        self.ball_radii = np.array([solid.ball_radius for solid in solids]) * 1.0001
        self.tones = np.array([solid.tone for solid in solids])
        self.plane_counts = np.array([len(solid.planes) for solid in solids], np.float64)
        self.planes = np.array([plane for solid in solids for plane in solid.planes], np.float64).reshape(-1, 4)
        self.spots, self.spot_radius = np.asarray(spots, np.float64), spot_radius
        self.feet = np.array([list(vars(foot).values()) for foot in feet])
        self.hull, self.hull_radius = _hull(self.balls, self.ball_radii)
        self.stripe_axis: int = more.get("stripe_axis", 1)
        self.shades_itself: bool = more.get("shades_itself", False)
        self.joints: np.ndarray | None = more.get("joints")


@lru_cache(maxsize=512)
def shape_of(name: str, pose: tuple[float, ...] = ()) -> Shape:
    """The shape of this name; of a doll, in this pose."""
    return _doll(pose) if name == "doll" else _BUILDERS[name]()


def box_planes(a: float, b: float, c: float) -> list[tuple[float, ...]]:
    """Planes (outward normal, offset) of a box of half sizes a, b, c."""
    return [(1, 0, 0, a), (-1, 0, 0, a), (0, 1, 0, b), (0, -1, 0, b), (0, 0, 1, c), (0, 0, -1, c)]


def pyramid_planes(a: float, h: float) -> list[tuple[float, ...]]:
    """Planes of a pyramid with a square base of half size a at y = 0 and its tip at y = h."""
    s = math.sqrt(a * a + h * h)
    up, out, offset = a / s, h / s, a * h / s
    return [(out, up, 0, offset), (-out, up, 0, offset), (0, up, out, offset), (0, up, -out, offset), (0, -1, 0, 0)]


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


CUBE_HALF = 0.80
PYRAMID_HALF, PYRAMID_HEIGHT = 0.90, 1.75
TORUS_MAJOR, TORUS_MINOR = 0.69, 0.31
CYLINDER_RADIUS, CYLINDER_HALF = 0.74, 0.86
CONE_RADIUS, CONE_HEIGHT = 0.92, 1.95


def _hull(balls: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, float]:
    """A ball around all balls."""
    middle = ((balls - radii[:, None]).min(0) + (balls + radii[:, None]).max(0)) / 2
    return middle, float((np.sqrt(((balls - middle) ** 2).sum(1)) + radii).max())


def _ball() -> Shape:
    middle = np.array([0.0, 1.0, 0.0])
    foot = Foot(0, 0, 0, 0, 0.05, 0.95, 0.75)
    return Shape([Solid(ELLIPSOID, middle, (1, 1, 1), middle, 1.0)], middle + fibonacci(24), 0.24, [foot])


def _cube() -> Shape:
    a = CUBE_HALF
    middle = np.array([0.0, a, 0.0])
    square = [(-0.5, -0.5), (0.5, -0.5), (0, 0), (-0.5, 0.5), (0.5, 0.5)]
    spots = [np.roll([sign, u, v], axis) for axis in range(3) for sign in (-1, 1) for u, v in square]
    solid = Solid(PLANES, middle, (a, a, a), middle, a * math.sqrt(3), planes=box_planes(a, a, a))
    return Shape([solid], middle + a * np.array(spots), 0.19, [Foot(0, 0, a, a, 0.0, 0.4, 0.55)])


def _cylinder() -> Shape:
    r, h = CYLINDER_RADIUS, CYLINDER_HALF
    middle = np.array([0.0, h, 0.0])
    rows = [ring(7, r, y, phase) for y, phase in ((0.3, 0.0), (0.86, 0.5), (1.42, 0.0))]
    spots = np.concatenate([*rows, ring(4, r * 0.58, 2 * h, 0.5)])
    solid = Solid(CYLINDER, middle, (r, h, r), middle, math.hypot(r, h))
    return Shape([solid], spots, 0.19, [Foot(0, 0, 0, 0, r, 0.4, 0.55)])


def _cone() -> Shape:
    r, h = CONE_RADIUS, CONE_HEIGHT
    reach = (h * h + r * r) / (2 * h)  # of the sphere through the tip and the base's rim
    rows = [(8, 0.22, 0.0), (6, 0.72, 0.5), (4, 1.2, 0.0), (2, 1.62, 0.5)]
    spots = np.concatenate([ring(num, r * (1 - y / h), y, phase) for num, y, phase in rows])
    solid = Solid(CONE, (0, 0, 0), (r, h, r), (0, h - reach, 0), reach)
    return Shape([solid], spots, 0.17, [Foot(0, 0, 0, 0, r, 0.4, 0.5)])


def _torus() -> Shape:
    major, minor = TORUS_MAJOR, TORUS_MINOR
    middle = np.array([0.0, major + minor, 0.0])
    around, outer = (ring(10, radius, 0.0, phase)[:, [0, 2, 1]] for radius, phase in ((major, 0.0), (1.0, 0.5)))
    spots = middle + np.concatenate([around + (0, 0, minor), around - (0, 0, minor), outer])
    solid = Solid(TORUS, middle, (major, minor, 0), middle, major + minor)
    feet = [Foot(0, 0, 0.25, 0.02, 0.06, 0.55, 0.65)]
    return Shape([solid], spots, 0.14, feet, shades_itself=True, stripe_axis=0)


def _pyramid() -> Shape:
    a, h = PYRAMID_HALF, PYRAMID_HEIGHT
    reach = (h * h + 2 * a * a) / (2 * h)
    places = [(-0.56, 0.16), (0.0, 0.16), (0.56, 0.16), (-0.28, 0.48), (0.28, 0.48), (0.0, 0.8)]
    spots = [(side * a * (1 - y / h), y, u) for u, y in places for side in (-1, 1)]
    solid = Solid(PLANES, (0, 0, 0), (a, h, a), (0, h - reach, 0), reach, planes=pyramid_planes(a, h))
    feet = [Foot(0, 0, a, a, 0.0, 0.35, 0.5)]
    return Shape([solid], spots + [(u, y, x) for x, y, u in spots], 0.16, feet)


def _doll(pose: tuple[float, ...]) -> Shape:
    parts, joints = doll.build(pose)
    solids, spots, feet = [], [], []
    for part in parts:
        reach = max(part.radii)
        solids.append(Solid(ELLIPSOID, part.centre, part.radii, part.centre, reach, part.axes, part.tone))
        if part.tone != 1.0:
            continue
        local = fibonacci(14 if min(part.radii) > 0.2 else 8) * part.radii
        spots += [part.centre + sum(point[i] * part.axes[i] for i in range(3)) for point in local]
        if part.centre[1] - reach < 0.1:
            feet.append(Foot(part.centre[0], part.centre[2], 0.05, 0.1, 0.1, 0.45, 0.5))
    return Shape(solids, spots, 0.085, feet, shades_itself=True, joints=joints)


_BUILDERS = {
    "ball": _ball,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "pyramid": _pyramid,
}
