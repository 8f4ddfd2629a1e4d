"""The straight lines that a rendered scene shows: edges of cubes and pyramids, sides of cylinders and cones, and the
lines of the background."""

import itertools
import math

import numpy as np

from uniworld.data.scenes import backdrops, camera, shapes
from uniworld.data.scenes.graph import Thing
from uniworld.data.scenes.render import Rendered
from uniworld.data.scenes.solids import thing_points

SAMPLES = 96  # points of a line at which it is seen or hidden
TOLERANCE = 0.05  # world units of depth
SHORTEST = 4 / 128  # of a line that counts, as a share of the picture's width


def visible_lines(rendered: Rendered) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both ends, pixels [2], of every visible piece of a straight line."""
    size = len(rendered.ids)
    nearby = _deepest_nearby(rendered.depth)
    bare = np.where(rendered.ids == 0, np.inf, 0)  # lines of the background are seen wherever no thing is
    pieces = []
    for thing in rendered.scene.things:
        for a, b in thing_lines(thing):
            pieces += _pieces(np.asarray(a), np.asarray(b), size, nearby)
    for a, b in backdrops.straight_lines(rendered.scene.background):
        pieces += _pieces(np.asarray(a), np.asarray(b), size, bare)
    return pieces


def thing_lines(thing: Thing) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both ends in the world, [3], of the straight edges and outlines of a thing, hidden ones included."""
    if thing.shape == "cube":
        a = shapes.CUBE_HALF
        corners = thing_points(thing, [(x, a + y, z) for x, y, z in itertools.product((-a, a), repeat=3)])
        return [(corners[i], corners[i ^ bit]) for i in range(8) for bit in (1, 2, 4) if not i & bit]
    if thing.shape == "pyramid":
        a, h = shapes.PYRAMID_HALF, shapes.PYRAMID_HEIGHT
        points = thing_points(thing, [(-a, 0, -a), (a, 0, -a), (a, 0, a), (-a, 0, a), (0, h, 0)])
        return [(points[i], points[j]) for i in range(4) for j in ((i + 1) % 4, 4)]
    if thing.shape == "cylinder":
        return _outline(thing, shapes.CYLINDER_RADIUS, shapes.CYLINDER_RADIUS, 2 * shapes.CYLINDER_HALF, slope=0.0)
    if thing.shape == "cone":
        return _outline(thing, shapes.CONE_RADIUS, 0.0, shapes.CONE_HEIGHT, shapes.CONE_RADIUS / shapes.CONE_HEIGHT)
    return []


def _outline(thing: Thing, low: float, high: float, height: float, slope: float) -> list:
    """The two lines on an upright round body where view rays only touch it: radius `low` at the floor, `high` at
    `height`; its normal rises by `slope`."""
    x, z = thing.place
    dx, dz = camera.POSITION[0] - x, camera.POSITION[2] - z
    # On the line at angle u the normal (cos u, slope, sin u) is square to the way to the camera from its upper end.
    rise = (camera.POSITION[1] - height * thing.radius) * slope - (0 if slope else high * thing.radius)
    share = -rise / math.hypot(dx, dz)
    if abs(share) > 1:
        return []
    lines = []
    for side in (1, -1):
        u = math.atan2(dz, dx) + side * math.acos(share)
        ends = ((low, 0.0), (high, height))
        lines.append(tuple(
            np.array([x + r * thing.radius * math.cos(u), y * thing.radius, z + r * thing.radius * math.sin(u)])
            for r, y in ends
        ))  # fmt: skip
    return lines


def _deepest_nearby(depth: np.ndarray) -> np.ndarray:
    """The greatest depth within one pixel: an edge lies between its thing and what is behind."""
    padded = np.pad(depth, 1, mode="edge")
    n = len(depth)
    return np.max([padded[dy : dy + n, dx : dx + n] for dy in range(3) for dx in range(3)], axis=0)


def _pieces(a: np.ndarray, b: np.ndarray, size: int, depth: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The visible pieces of one line: runs of points inside the picture and not deeper than `depth` there."""
    points = a + np.linspace(0, 1, SAMPLES)[:, None] * (b - a)
    pixels, z = camera.project(points, size), camera.to_camera(points)[:, 2]
    inside = ((pixels >= 0) & (pixels < size)).all(1)
    column, row = np.clip(pixels.astype(np.int64), 0, size - 1).T
    seen = inside & (z <= depth[row, column] + TOLERANCE)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], seen.astype(np.int8), [0]])))
    runs = [(pixels[i], pixels[j - 1]) for i, j in zip(edges[0::2], edges[1::2])]
    return [(p, q) for p, q in runs if math.dist(p, q) >= SHORTEST * size]
