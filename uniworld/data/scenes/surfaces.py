"""Light on surfaces: the six lights, the directions of shadow rays, and linear light to 8-bit sRGB."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from uniworld.data.scenes.graph import LIGHTS

NUM_FLOOR_RAYS, NUM_SOLID_RAYS = 24, 8  # towards the sun: of a pixel of the floor, of a quarter pixel of a solid
LUT_STEPS = 16384


@dataclass(frozen=True)
class Light:
    """A sun of `softness` (tangent of its angular radius), its colour, and what comes from above and from below."""

    towards: tuple[float, float, float]
    sun: tuple[float, float, float]
    sky: tuple[float, float, float]
    ground: float = 0.62
    softness: float = 0.13


_TABLE = {
    "left": Light((-0.62, 0.95, -0.55), (0.98, 0.96, 0.92), (0.40, 0.41, 0.44)),
    "right": Light((0.62, 0.95, -0.55), (0.98, 0.96, 0.92), (0.40, 0.41, 0.44)),
    "front": Light((-0.12, 0.95, -0.80), (0.94, 0.93, 0.90), (0.42, 0.43, 0.45)),
    "warm": Light((-0.75, 0.80, -0.35), (1.10, 0.95, 0.74), (0.42, 0.39, 0.37), softness=0.10),
    "cool": Light((0.50, 1.05, -0.45), (0.82, 0.92, 1.04), (0.38, 0.42, 0.48), softness=0.20),
    "dim": Light((-0.35, 1.0, -0.60), (0.62, 0.62, 0.65), (0.36, 0.37, 0.40), softness=0.24),
}
assert tuple(_TABLE) == LIGHTS


def light(name: str) -> Light:
    return _TABLE[name]


@cache
def light_rows(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [11] (direction, sun, sky, ground share, softness) and the two tables of unit shadow rays [N, 3]."""
    source = _TABLE[name]
    towards = np.array(source.towards) / math.sqrt(sum(v * v for v in source.towards))
    row = np.array([*towards, *source.sun, *source.sky, source.ground, source.softness])
    rays = [_disc_rays(towards, source.softness, num) for num in (NUM_FLOOR_RAYS, NUM_SOLID_RAYS)]
    return row, *rays


def _disc_rays(towards: np.ndarray, softness: float, num: int) -> np.ndarray:
    """Unit directions [num, 3] to points spread evenly over the sun's disc."""
    across = np.cross(towards, [0.0, 1.0, 0.0])
    across /= np.linalg.norm(across)
    along = np.cross(across, towards)
    rows = []
    for i in range(num):
        radius, angle = softness * math.sqrt((i + 0.5) / num), math.pi * (3 - math.sqrt(5)) * i
        ray = towards + radius * math.cos(angle) * across + radius * math.sin(angle) * along
        rows.append(ray / np.linalg.norm(ray))
    return np.array(rows)


@lru_cache(maxsize=1)
def srgb_table() -> np.ndarray:
    """uint8 [LUT_STEPS + 1]: linear light i / LUT_STEPS as 8-bit sRGB."""
    v = np.arange(LUT_STEPS + 1) / LUT_STEPS
    encoded = np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)
    return np.floor(encoded * 255 + 0.5).astype(np.uint8)
