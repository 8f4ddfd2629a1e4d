"""The shapes of scenes by the inequalities that define them: a reference for tests, apart from the ray caster."""

import math

import numpy as np

from uniworld.data.scenes import doll
from uniworld.data.scenes.graph import SIZE_RADIUS, Thing

FLOOR_X, FLOOR_Z = 1.4, 2.6  # world units at x = 1 and z = 1


def local(thing: Thing, points: np.ndarray) -> np.ndarray:
    """World points in a thing's axes, in units of its radius, from the middle of its footprint."""
    p = points - np.array([thing.x * FLOOR_X, 0, thing.z * FLOOR_Z])
    c, s = math.cos(math.radians(thing.yaw)), math.sin(math.radians(thing.yaw))
    turned = np.stack([c * p[..., 0] - s * p[..., 2], p[..., 1], s * p[..., 0] + c * p[..., 2]], -1)
    return turned / SIZE_RADIUS[thing.size]


def is_inside(thing: Thing, points: np.ndarray) -> np.ndarray:
    """Whether world points lie in a thing, by the inequality that defines its shape."""
    x, y, z = np.moveaxis(local(thing, points), -1, 0)
    rho = np.hypot(x, z)
    if thing.shape == "doll":
        p = np.stack([x, y, z], -1)
        parts, _ = doll.build(thing.pose)
        return np.any([(((p - q.centre) @ q.axes.T / q.radii) ** 2).sum(-1) < 1 for q in parts], axis=0)
    return {
        "ball": lambda: x**2 + (y - 1) ** 2 + z**2 < 1,
        "cube": lambda: np.maximum(np.maximum(abs(x), abs(y - 0.8)), abs(z)) < 0.8,
        "cylinder": lambda: (rho < 0.74) & (abs(y - 0.86) < 0.86),
        "cone": lambda: (rho < 0.92 * (1 - y / 1.95)) & (y > 0) & (y < 1.95),
        "torus": lambda: (np.hypot(x, y - 1) - 0.69) ** 2 + z**2 < 0.31**2,
        "pyramid": lambda: (np.maximum(abs(x), abs(z)) < 0.9 * (1 - y / 1.75)) & (y > 0),
    }[thing.shape]()
