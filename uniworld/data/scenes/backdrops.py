"""The eight backdrops, and plain white: floor and wall as albedo images, and the mean colours that they shine back."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniworld.data.scenes import camera
from uniworld.data.scenes.graph import PLAIN
from uniworld.data.scenes.solids import linear

# Textures of each backdrop. Training scenes have even seeds and held-out ones odd seeds, so that no texture is in both;
# of two, which training had at first, a model learns what they look like and not to copy what a picture shows.
TRAIN_TEXTURES, HELD_OUT_TEXTURES = 32, 2
KEPT_PX, NUM_KEPT, NUM_KEPT_LARGE = 256, 320, 64  # pictures of backdrops kept in memory, small ones and larger ones


@dataclass(frozen=True)
class Backdrop:
    """albedo: float32 [H, W, 3], linear. floor, low, high [3]: mean colours of the floor and of the wall's lower and
    upper part. wall_lit: whether things cast shadows on the wall; a painted sky takes none. bend: height over which the
    wall rises from the floor without a seam, 0 where there is one."""

    albedo: np.ndarray
    floor: np.ndarray
    low: np.ndarray
    high: np.ndarray
    wall_lit: bool
    bend: float


def texture_of(seed: int) -> int:
    """The texture in a scene of this seed: even in training, odd in held-out scenes."""
    is_held_out = seed % 2
    return 2 * (seed // 2 % (HELD_OUT_TEXTURES if is_held_out else TRAIN_TEXTURES)) + is_held_out


def backdrop(name: str, texture: int, size_px: int) -> Backdrop:
    """The backdrop of this name, with this texture, as the camera sees it."""
    return (_paint if size_px <= KEPT_PX else _paint_large)(name, texture, size_px)


def _painted(name: str, texture: int, size_px: int) -> Backdrop:
    ground = _Ground(size_px, seed=1 + texture)
    floor, wall = _PAINTERS[name](ground)
    colours = np.where(ground.on_floor[..., None], floor, wall)
    albedo = linear(np.clip(colours, 0, 255)).reshape(size_px, STEPS, size_px, STEPS, 3).mean((1, 3))
    on_floor = ground.on_floor.reshape(size_px, STEPS, size_px, STEPS).mean((1, 3))
    wall_rows = np.flatnonzero((on_floor == 0).all(1))
    low, high = albedo[wall_rows[len(wall_rows) // 2 :]].mean((0, 1)), albedo[wall_rows[:4]].mean((0, 1))
    return Backdrop(
        albedo=albedo.astype(np.float32),
        floor=albedo[on_floor == 1].mean(0),
        low=low,
        high=high,
        wall_lit=name in ("studio", "wood table", "tiles"),
        bend=0.0 if has_seam(name) else STUDIO_BEND,
    )


_paint = lru_cache(maxsize=NUM_KEPT)(_painted)
_paint_large = lru_cache(maxsize=NUM_KEPT_LARGE)(_painted)


def has_seam(name: str) -> bool:
    """Whether floor and wall meet in a line that is seen; the studio's paper bends."""
    return name not in ("studio", PLAIN)


def straight_lines(name: str) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """The straight lines of a backdrop, ends in the world."""
    edge = 3.6  # beyond the picture
    if not has_seam(name):
        return []
    if name == "beach":
        return [((-edge, BEACH_HORIZON, camera.WALL_Z), (edge, BEACH_HORIZON, camera.WALL_Z))]
    seam = ((-edge, 0.0, camera.WALL_Z), (edge, 0.0, camera.WALL_Z))
    if name == "wood table":
        return [seam, *(((i * PLANK, 0.0, NEAR_Z), (i * PLANK, 0.0, camera.WALL_Z)) for i in range(-5, 6))]
    if name == "tiles":
        along = [(((i - 0.5) * TILE, 0.0, NEAR_Z), ((i - 0.5) * TILE, 0.0, camera.WALL_Z)) for i in range(-3, 5)]
        across = [((-edge, 0.0, j * TILE), (edge, 0.0, j * TILE)) for j in range(-1, 5)]
        return [seam, *along, *across]
    return [seam]


STUDIO_BEND = 1.4
NEAR_Z = -1.4  # of the floor at the bottom of the picture
PLANK, TILE = 0.62, 0.95  # widths, world units
BEACH_HORIZON = 0.8  # height on the wall
STEPS = 2  # points a pixel, each way
GRID = 128  # random values each way, between which noise goes over; a power of two, for the sake of speed


class _Ground:
    """Where each point of the picture lies: x, z on the floor, or x, y on the wall (world units), and noise there."""

    def __init__(self, size_px: int, seed: int):
        num = size_px * STEPS
        v, u = np.meshgrid((np.arange(num) + 0.5) / num, (np.arange(num) + 0.5) / num, indexing="ij")
        t = camera.TAN_HALF_FOV
        right, up, forward = (np.array(axis) for axis in (camera.RIGHT, camera.UP, camera.FORWARD))
        ray = forward + ((2 * u - 1) * t)[..., None] * right + ((1 - 2 * v) * t)[..., None] * up
        px, py, pz = camera.POSITION
        to_wall = (camera.WALL_Z - pz) / ray[..., 2]
        to_floor = np.where(ray[..., 1] < 0, -py / np.minimum(ray[..., 1], -1e-9), np.inf)
        self.on_floor = to_floor < to_wall
        along = np.minimum(to_floor, to_wall)
        self.x, self.z = px + along * ray[..., 0], pz + along * ray[..., 2]
        self.y = np.where(self.on_floor, 0.0, py + along * ray[..., 1])
        self.grid = np.random.default_rng(seed).random((GRID, GRID))
        self.shift = seed * 17.3

    def noise(self, a: np.ndarray, b: np.ndarray, layer: int = 0) -> np.ndarray:
        """Smooth noise from -1 to 1 with features of about one unit of a and b."""
        a, b = a + self.shift + 31.7 * layer, b + 11.3 * layer + 40
        i, j = np.floor(a), np.floor(b)
        f, g = a - i, b - j
        f, g = f * f * (3 - 2 * f), g * g * (3 - 2 * g)
        rows, columns = ((k.astype(np.int32), k.astype(np.int32) + 1) for k in (i, j))
        rows, columns = [(k & GRID - 1) * GRID for k in rows], [k & GRID - 1 for k in columns]
        near, far = ([self.grid.take(row + column, mode="clip") for column in columns] for row in rows)
        top, bottom = (low * (1 - g) + high * g for low, high in (near, far))
        return 2 * (top * (1 - f) + bottom * f) - 1

    def rough(self, a: np.ndarray, b: np.ndarray, octaves: int = 3, layer: int = 0) -> np.ndarray:
        """Noise of several sizes, each half of the one before."""
        total = sum(0.5**k * self.noise(a * 2**k, b * 2**k, layer + k) for k in range(octaves))
        return total / (2 - 0.5 ** (octaves - 1))


def _mix(low, high, share: np.ndarray) -> np.ndarray:
    """Colours between two, [H, W, 3], by share [H, W] from 0 to 1."""
    share = np.clip(share, 0, 1)[..., None]
    return np.asarray(low, np.float64) * (1 - share) + np.asarray(high, np.float64) * share


def _step(value: np.ndarray, width: float) -> np.ndarray:
    """From 0 to 1 around value 0, smoothly over `width`."""
    s = np.clip(value / width + 0.5, 0, 1)
    return s * s * (3 - 2 * s)


def _sky(g: _Ground, low, high, clouds: float) -> np.ndarray:
    sky = _mix(low, high, g.y / 3.0)
    puffs = _step(g.rough(g.x * 0.55, g.y * 1.5, 3, layer=7) - 0.12, 0.7) * np.clip((g.y - 0.9) / 0.7, 0, 1)
    return _mix(sky, (250, 250, 250), clouds * puffs)


def _ridge(g: _Ground, height: float, rise: float, scale: float, layer: int) -> np.ndarray:
    """1 below a line of hills on the wall, 0 above."""
    return _step(height + rise * g.rough(g.x * scale, np.zeros_like(g.x), 3, layer) - g.y, 0.05)


def _studio(g: _Ground):
    paper = 178 + 3 * g.rough(g.x * 3, (g.z + g.y) * 3, 2)
    glow = np.clip(1 - ((g.x / 3.4) ** 2 + ((g.y - 1.2) / 2.6) ** 2), 0, 1)
    bend = np.clip((g.z - 3.4) / 1.2, 0, 1) ** 2  # the paper rises in a curve: no line between floor and wall
    floor = paper - 10 * bend
    wall = paper - 10 + 26 * glow * _step(g.y / STUDIO_BEND - 0.5, 1.0)
    tint = np.array([1.0, 0.985, 0.955])
    return floor[..., None] * tint, wall[..., None] * tint


def _wood_table(g: _Ground):
    plank = np.floor(g.x / PLANK)
    across = g.x / PLANK - plank
    grain = g.rough(g.x * 9 + plank * 3.7, g.z * 0.7 + plank * 5.1, 3, layer=1)
    rings = g.noise(g.x * 26 + 1.6 * grain, g.z * 1.1 + plank * 2.3, layer=4)
    tone = 0.5 + 0.32 * grain + 0.14 * rings + 0.3 * (g.grid[(plank % GRID).astype(np.int64), 7] - 0.5)
    seam = np.clip(np.minimum(across, 1 - across) / 0.03, 0, 1)
    floor = _mix((138, 104, 76), (182, 146, 112), tone) * (0.72 + 0.28 * seam)[..., None]
    wall = _mix((176, 178, 168), (198, 198, 188), g.y / 2.6) + 3 * g.rough(g.x * 2, g.y * 2, 3)[..., None]
    return floor, wall * (0.80 + 0.20 * np.clip(g.y / 0.12, 0, 1))[..., None]


def _beach(g: _Ground):
    sand = _mix((196, 178, 142), (220, 204, 170), 0.5 + 0.5 * g.rough(g.x * 2.2, g.z * 2.2, 4))
    shore = 3.75 + 0.14 * g.noise(g.x * 0.9, np.zeros_like(g.x), 2)
    wet = _mix(sand, (176, 158, 130), _step(g.z - shore + 0.28, 0.3))
    sea = _mix((134, 176, 180), (100, 146, 162), (g.z - shore) / 0.9)
    foam = np.clip(1 - np.abs(g.z - shore - 0.03) / 0.09, 0, 1)
    floor = _mix(_mix(wet, sea, _step(g.z - shore, 0.05)), (240, 244, 242), 0.9 * foam)
    waves = 7 * g.noise(g.x * 2.2, g.y * 16, 5)
    far_sea = _mix((100, 146, 162), (86, 126, 150), g.y / BEACH_HORIZON) + waves[..., None]
    wall = _mix(_sky(g, (222, 228, 226), (160, 190, 212), 0.75), far_sea, _step(BEACH_HORIZON - g.y, 0.03))
    return floor, wall


def _meadow(g: _Ground):
    blades = 0.6 * g.rough(g.x * 9, g.z * 5, 3, layer=1) + 0.4 * g.rough(g.x * 1.1, g.z * 0.9, 2, layer=3)
    floor = _mix((104, 124, 74), (150, 164, 104), 0.5 + 0.75 * blades)
    wall = _sky(g, (214, 224, 224), (158, 188, 212), 0.8)
    for height, rise, scale, colour, layer in (
        (1.0, 0.42, 0.5, (142, 162, 150), 11),
        (0.62, 0.3, 0.7, (124, 146, 112), 14),
        (0.22, 0.16, 1.1, (104, 124, 78), 17),
    ):
        wall = _mix(wall, colour, _ridge(g, height, rise, scale, layer))
    return floor, wall


def _night(g: _Ground):
    floor = _mix((78, 82, 108), (96, 100, 126), 0.5 + 0.6 * g.rough(g.x * 1.6, g.z * 1.6, 4))
    wall = _mix((74, 78, 116), (26, 30, 62), g.y / 2.4)
    cell_x, cell_y = np.floor(g.x / 0.26), np.floor(g.y / 0.26)
    pick = [g.grid[(cell_x + k).astype(np.int64) % GRID, cell_y.astype(np.int64) % GRID] for k in (0, 37, 71)]
    star = np.hypot(g.x / 0.26 - cell_x - 0.2 - 0.6 * pick[1], g.y / 0.26 - cell_y - 0.2 - 0.6 * pick[2])
    bright = np.where(pick[0] > 0.8, np.clip(1 - star / (0.1 + 0.12 * pick[1]), 0, 1), 0) * np.clip(g.y - 0.5, 0, 1)
    wall = _mix(wall, (240, 240, 225), bright)
    moon = np.hypot(g.x - 1.75, g.y - 2.15)
    wall = wall + (26 * np.clip(1 - moon / 1.1, 0, 1) ** 2)[..., None]
    wall = _mix(wall, (232, 230, 212), _step(0.25 - moon, 0.04))
    wall = _mix(wall, (46, 50, 78), _ridge(g, 0.5, 0.3, 0.6, 11))
    return floor, wall


def _tiles(g: _Ground):
    a, b = g.x / TILE + 0.5, g.z / TILE
    i, j = np.floor(a), np.floor(b)
    tone = np.where((i + j) % 2 == 0, 205.0, 166.0) + 8 * (
        g.grid[i.astype(np.int64) % GRID, j.astype(np.int64) % GRID] - 0.5
    )
    tone = tone + 4 * g.rough(g.x * 4, g.z * 4, 3)
    grout = np.minimum(np.minimum(a - i, 1 - a + i), np.minimum(b - j, 1 - b + j)) * TILE
    floor = _mix((128, 126, 122), tone[..., None] * np.array([1.0, 0.985, 0.96]), np.clip(grout / 0.022, 0, 1))
    wall = _mix((166, 176, 184), (190, 197, 203), g.y / 2.6)
    skirting = _mix((206, 204, 198), (226, 224, 218), _step(g.y - 0.1, 0.15))
    return floor, _mix(
        wall * (0.9 + 0.1 * np.clip((g.y - 0.24) / 0.1, 0, 1))[..., None], skirting, _step(0.24 - g.y, 0.02)
    )


def _snow(g: _Ground):
    drift = g.rough(g.x * 0.9, g.z * 1.3, 3)
    floor = _mix((186, 196, 214), (222, 228, 238), 0.55 + 0.7 * drift) + 3 * g.noise(g.x * 30, g.z * 24, 3)[..., None]
    wall = _sky(g, (218, 224, 232), (168, 188, 210), 0.5)
    peaks = 1.15 + 0.9 * np.abs(g.rough(g.x * 0.42, np.zeros_like(g.x), 3, 12)) - 0.35
    rock = _mix((150, 164, 186), (226, 232, 240), _step(g.y - peaks + 0.5 + 0.5 * g.noise(g.x * 3, g.y * 2, 9), 0.4))
    wall = _mix(wall, rock, _step(peaks - g.y, 0.05))
    wall = _mix(wall, (204, 213, 226), _ridge(g, 0.4, 0.25, 0.7, 17))
    return floor, wall


def _desert(g: _Ground):
    bend = 1.4 * g.rough(g.x * 0.5, g.z * 0.5, 2, layer=2)
    ripple = np.abs(((g.z * 2.6 + bend * 1.6) % 1.0) - 0.5) * 2
    floor = _mix((186, 150, 112), (214, 180, 140), 0.2 + 0.5 * ripple + 0.4 * g.rough(g.x * 2, g.z * 2, 3))
    wall = _sky(g, (232, 222, 204), (160, 190, 206), 0.35)
    mesa = 0.75 + 0.5 * _step(g.noise(g.x * 0.55, np.zeros_like(g.x), 13) - 0.1, 0.25)
    strata = 8 * g.noise(g.x * 0.4, g.y * 9, 6)
    wall = _mix(wall, np.array([186.0, 146, 122]) + strata[..., None], _step(mesa - g.y, 0.05))
    wall = _mix(wall, (200, 164, 126), _ridge(g, 0.42, 0.3, 0.55, 15))
    return floor, wall


def _plain(g: _Ground):
    white = np.full((*g.y.shape, 3), 244.0)
    return white, white


_PAINTERS = {
    "studio": _studio,
    "wood table": _wood_table,
    "beach": _beach,
    "meadow": _meadow,
    "night": _night,
    "tiles": _tiles,
    "snow": _snow,
    "desert": _desert,
    PLAIN: _plain,
}
