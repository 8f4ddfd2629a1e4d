"""The colour of every pixel, in NumPy: like `tracing.py`, the definition of what `csrc/scene_render.cpp` computes.

Linear light, float64; colours are tuples of three arrays. A pixel is the mean of its four quarters. In each the nearest
solid is shaded; where there is none, the floor or the backdrop, which are shaded once a pixel.
"""

import numpy as np

from uniworld.data.scenes import solids as s
from uniworld.data.scenes.tracing import (
    Vector,
    dot,
    first_hit,
    hit,
    lit_share,
    minus,
    normal_at,
    plus,
    take,
    times,
    unit,
)

MATTE, GLOSSY, METAL, STRIPED, DOTTED = range(5)
# Entries of `view`: camera position, its axes right, up and forward, tangent of half the field of view, wall's Z.
VIEW_RIGHT, VIEW_UP, VIEW_FORWARD = slice(3, 6), slice(6, 9), slice(9, 12)
# Entries of `around`, what is seen and shines back: floor, backdrop low and high, light from below, whether the wall
# takes shadows, and the height over which it bends up from the floor (0: it does not).
FLOOR, LOW, HIGH, BOUNCE, WALL_LIT, BEND = slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12), 12, 13
STRIPE_SHARE = 0.42
WALL_FACING = 0.55  # how squarely the sun falls on a wall, whatever the light
NUDGE = 1e-3  # world units off a surface, from which its shadow and reflection rays start


def view_rays(view: np.ndarray, size: int, step: int) -> np.ndarray:
    """Unit directions [n, n, 3] through the centres of a grid of step x step points a pixel, n = size step."""
    centres = (np.arange(size * step) + 0.5) / step
    y, x = np.meshgrid(centres, centres, indexing="ij")
    u = (2.0 * x / size - 1.0) * view[12]
    v = (1.0 - 2.0 * y / size) * view[12]
    right, up, forward = view[VIEW_RIGHT], view[VIEW_UP], view[VIEW_FORWARD]
    return np.stack(unit(tuple((forward[i] + u * right[i]) + v * up[i] for i in range(3))), -1)


def nearest(tables: s.Tables, view: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For a grid of unit rays [n, n, 3]: the nearest solid or -1, its distance, and per thing how many rays meet it."""
    n = len(rays)
    best, which = np.full((n, n), np.inf), np.full((n, n), -1)
    met = np.zeros((len(tables.things), n, n), bool)
    for k, row in enumerate(tables.solids):
        left, right, top, bottom = ((row[s.BOUNDS] * 0.5 + 0.5) * n).tolist()
        columns = slice(max(int(left) - 1, 0), max(min(int(right) + 2, n), 0))
        rows = slice(max(int(top) - 1, 0), max(min(int(bottom) + 2, n), 0))
        direction = vectors(rays[rows, columns])
        origin = tuple(np.full(len(direction[0]), v) for v in view[0:3])
        t = hit(row, tables.planes, origin, direction).reshape(best[rows, columns].shape)
        nearer = t < best[rows, columns]
        best[rows, columns] = np.where(nearer, t, best[rows, columns])
        which[rows, columns] = np.where(nearer, k, which[rows, columns])
        met[int(row[s.THING]), rows, columns] |= t < np.inf
    return which, best, met.sum((1, 2))


def vectors(rows: np.ndarray) -> Vector:
    """Rows [..., 3] as a vector of flat arrays."""
    return tuple(rows[..., i].ravel() for i in range(3))


def backdrop_hit(view: np.ndarray, direction: Vector) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the floor or the wall behind it, and whether it is the floor."""
    falls = direction[1] < 0.0
    to_floor = np.where(falls, -view[1] / np.where(falls, direction[1], 1.0), np.inf)
    to_wall = (view[13] - view[2]) / direction[2]
    return np.minimum(to_floor, to_wall), to_floor < to_wall


def shade_backdrop(tables, view, light, rays, around, albedo: np.ndarray, direction: Vector) -> np.ndarray:
    """Colours [M, 3] of the floor and wall that view rays [M] meet. albedo: float32 [M, 3]."""
    t, on_floor = backdrop_hit(view, direction)
    point = tuple(view[i] + t * direction[i] for i in range(3))
    shade = np.ones(len(albedo))
    for foot in tables.feet:
        shade = shade * _foot_shade(foot, point)
    receives = on_floor | (around[WALL_LIT] > 0.0)
    lit = np.ones(len(albedo))
    index = np.flatnonzero(receives)
    lit[index] = lit_share(tables, light, rays, take(point, index), np.full(len(index), -1))
    upright = np.minimum(point[1] / around[BEND], 1.0) if around[BEND] > 0.0 else 1.0
    facing = light[1] + (WALL_FACING - light[1]) * upright
    sun = np.where(on_floor, light[1] * lit * (0.35 + 0.65 * shade), facing * lit)
    ambient = np.where(on_floor, shade, 1.0)
    base = albedo.astype(np.float64)
    return np.stack([base[:, i] * (light[6 + i] * ambient + light[3 + i] * sun) for i in range(3)], 1)


def _foot_shade(foot: np.ndarray, point: Vector) -> np.ndarray:
    x, z = point[0] - foot[1], point[2] - foot[2]
    across = np.maximum(np.abs(x * foot[3] - z * foot[4]) - foot[5], 0.0)
    along = np.maximum(np.abs(x * foot[4] + z * foot[3]) - foot[6], 0.0)
    distance = np.maximum(np.sqrt(across * across + along * along) - foot[7], 0.0)
    near = np.maximum(1.0 - distance / foot[8], 0.0)
    return np.where(point[1] < 1e-6, 1.0 - foot[9] * (near * near), 1.0)


def shade_solids(tables, light, rays, around, which: np.ndarray, point: Vector, direction: Vector) -> np.ndarray:
    """Colours [M, 3] at points on solids `which` [M], seen along unit directions."""
    colours = np.zeros((len(which), 3))
    normal = normals(tables, which, point)
    owner = tables.solids[which, s.THING].astype(np.int64)
    for t in np.unique(owner):
        index = np.flatnonzero(owner == t)
        tone = tables.solids[which[index], s.TONE]
        at = (take(point, index), take(normal, index), take(direction, index))
        colours[index] = _shade_thing(tables, light, rays, around, t, tone, *at)
    return colours


def normals(tables: s.Tables, which: np.ndarray, point: Vector) -> Vector:
    out = tuple(np.zeros(len(which)) for _ in range(3))
    for k in np.unique(which):
        index = np.flatnonzero(which == k)
        for axis, values in zip(out, normal_at(tables.solids[k], tables.planes, take(point, index))):
            axis[index] = values
    return out


def _shade_thing(tables, light, rays, around, t: int, tone, point: Vector, normal: Vector, direction: Vector):
    thing = tables.things[t]
    material = int(thing[s.MATERIAL])
    base = _base_colour(tables, thing, material, point, tone)
    towards = tuple(light[0:3])
    slope = np.maximum(dot(normal, towards), 0.0)
    start = plus(point, times(NUDGE, normal))
    lit = np.zeros(len(tone))
    index = np.flatnonzero(slope > 0.0)
    skip = np.full(len(index), -1 if thing[s.SHADES_ITSELF] > 0.0 else t)
    lit[index] = lit_share(tables, light, rays, take(start, index), skip)
    open_ = _openness(tables, t, point, normal)
    upward = 0.5 + 0.5 * normal[1]
    sun = slope * lit
    diffuse = [
        base[i] * (light[3 + i] * sun + (light[6 + i] * upward + around[9 + i] * (1.0 - upward)) * open_)
        for i in range(3)
    ]
    if material == MATTE:
        return np.stack(diffuse, 1)
    half = unit(minus(towards, direction))
    glint = np.maximum(dot(normal, half), 0.0)
    facing = np.maximum(-dot(normal, direction), 0.0)
    if material == GLOSSY:
        mirrored = _surroundings(light, around, _reflect(direction, normal))
        edge = 1.0 - facing
        fresnel = 0.04 + 0.5 * (edge * edge * edge * edge * edge)
        shine = 0.75 * _power(glint, 6) * lit
        return np.stack([diffuse[i] + (light[3 + i] * shine + fresnel * mirrored[i]) for i in range(3)], 1)
    if material == METAL:
        mirrored = _mirror(tables, light, around, t, start, _reflect(direction, normal))
        shine = 0.5 * _power(glint, 5) * lit
        return np.stack([_metal(base[i], diffuse[i], mirrored, i, light[3 + i] * shine) for i in range(3)], 1)
    shine = 0.16 * _power(glint, 5) * lit
    return np.stack([diffuse[i] + light[3 + i] * shine for i in range(3)], 1)


def _metal(base, diffuse, mirrored, i: int, shine):
    grey = 0.3 * mirrored[0] + 0.5 * mirrored[1] + 0.2 * mirrored[2]
    return 0.33 * diffuse + (0.03 + 1.05 * base) * (0.7 * grey + 0.3 * mirrored[i]) + shine


def _power(x: np.ndarray, doublings: int) -> np.ndarray:
    for _ in range(doublings):
        x = x * x
    return x


def _reflect(direction: Vector, normal: Vector) -> Vector:
    return minus(direction, times(2.0 * dot(direction, normal), normal))


def _base_colour(tables, thing, material: int, point: Vector, tone) -> Vector:
    second = np.zeros(len(tone), bool)
    if material == STRIPED:
        v = dot(tuple(thing[s.STRIPE]), point) + thing[s.STRIPE_OFFSET]
        second = v - np.floor(v) < STRIPE_SHARE
    elif material == DOTTED:
        start = int(thing[s.DOT_START])
        for spot in tables.dots[start : start + int(thing[s.DOT_COUNT])]:
            m = minus(point, tuple(spot[0:3]))
            second |= dot(m, m) < spot[3]
    pairs = zip(thing[s.COLOUR], thing[s.SECOND])
    return tuple(np.where(second, dark, colour) * tone for colour, dark in pairs)


def _openness(tables, t: int, point: Vector, normal: Vector) -> np.ndarray:
    """Ambient light that the floor and the other things leave, 0 to 1."""
    height = np.minimum(np.maximum(point[1] / (0.9 * tables.things[t, s.SCALE]), 0.0), 1.0)
    low, down = 1.0 - height, 0.5 - 0.5 * normal[1]
    left = 1.0 - 0.6 * down * (low * low)
    for j, other in enumerate(tables.things):
        if j == t:
            continue
        m = minus(tuple(other[s.HULL]), point)
        distance = np.sqrt(dot(m, m))
        fade = np.minimum(np.maximum((3.0 * other[s.SHADE] - distance) / (1.8 * other[s.SHADE]), 0.0), 1.0)
        facing = np.maximum(0.2 + 0.8 * (dot(normal, m) / distance), 0.0)
        left = left * (1.0 - 0.45 * (facing * (fade * fade)))
    return left


def _surroundings(light: np.ndarray, around: np.ndarray, d: Vector) -> Vector:
    """What a mirror shows of the world without things: floor, backdrop and the glow about the sun."""
    above = np.minimum(np.maximum((d[1] + 0.12) / 0.24, 0.0), 1.0)
    high = np.minimum(np.maximum(1.4 * d[1], 0.0), 1.0)
    glow = np.maximum(dot(d, tuple(light[0:3])), 0.0)
    glow = 0.8 * _power(glow, 4)
    return tuple(
        around[i] * (1.0 - above)
        + (around[3 + i] + (around[6 + i] - around[3 + i]) * high) * above
        + light[3 + i] * glow
        for i in range(3)
    )


def _mirror(tables, light, around, t: int, start: Vector, d: Vector) -> Vector:
    """What a metal thing shows: its surroundings with more contrast and a dark horizon, and the other things in plain
    shading."""
    contrast = 0.75 + 0.75 * np.minimum(np.maximum((d[1] + 0.1) / 0.5, 0.0), 1.0)
    dark = contrast * (1.0 - 0.7 * np.maximum(1.0 - np.abs(d[1] + 0.06) / 0.26, 0.0))
    strip = 0.9 * np.maximum(1.0 - np.abs(d[0] - 0.7 * light[0]) / 0.2, 0.0)  # a tall lamp on the side of the sun
    seen = tuple(dark * colour + light[3 + i] * strip for i, colour in enumerate(_surroundings(light, around, d)))
    which, distance = first_hit(tables, start, d, np.full(len(d[0]), t))
    index = np.flatnonzero(which >= 0)
    if not index.size:
        return seen
    point = plus(take(start, index), times(distance[index], take(d, index)))
    normal = normals(tables, which[index], point)
    slope = np.maximum(dot(normal, tuple(light[0:3])), 0.0)
    things = tables.things[tables.solids[which[index], s.THING].astype(np.int64)]
    tone = tables.solids[which[index], s.TONE]
    for i in range(3):
        seen[i][index] = things[:, i] * tone * (0.8 * light[6 + i] + 0.75 * light[3 + i] * slope)
    return seen


def picture(tables, view, quarter_rays, centre_rays, light, floor_rays, solid_rays, around, albedo, srgb):
    """uint8 [H, W, 3]: the scene.

    quarter_rays [2 H, 2 W, 3] and centre_rays [H, W, 3] are view rays; floor_rays and solid_rays [N, 3] go to the sun;
    albedo: float32 [H, W, 3] of floor and wall; srgb: 8-bit sRGB of evenly spaced linear light.
    """
    size = len(centre_rays)
    which, distance, _ = nearest(tables, view, quarter_rays)
    on_solid = which >= 0
    quarter = np.zeros((2 * size, 2 * size, 3))
    direction = vectors(quarter_rays[on_solid])
    point = tuple(view[i] + distance[on_solid] * direction[i] for i in range(3))
    quarter[on_solid] = shade_solids(tables, light, solid_rays, around, which[on_solid], point, direction)
    bare = ~on_solid
    needed = bare[0::2, 0::2] | bare[0::2, 1::2] | bare[1::2, 0::2] | bare[1::2, 1::2]
    behind = np.zeros((size, size, 3))
    direction = vectors(centre_rays[needed])
    behind[needed] = shade_backdrop(tables, view, light, floor_rays, around, albedo[needed], direction)
    quarters = []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        seen = np.where(on_solid[dy::2, dx::2, None], quarter[dy::2, dx::2], behind)
        quarters.append(np.minimum(seen, 1.0))
    mean = 0.25 * (((quarters[0] + quarters[1]) + quarters[2]) + quarters[3])
    return srgb[np.floor(mean * (len(srgb) - 1) + 0.5).astype(np.int64)]


def geometry(tables, view, centre_rays):
    """At pixel centres: ids uint8 [H, W], depth along the view float32 [H, W], normals in camera space float32
    [H, W, 3], and per thing the number of pixels that it would cover alone."""
    shape = centre_rays.shape[:2]
    which, distance, covered = nearest(tables, view, centre_rays)
    direction = vectors(centre_rays)
    behind, on_floor = backdrop_hit(view, direction)
    which, distance = which.ravel(), distance.ravel()
    t = np.where(which >= 0, distance, behind)
    depth = t * dot(direction, tuple(view[VIEW_FORWARD]))
    normal = [np.zeros(len(t)), np.where(on_floor, 1.0, 0.0), np.where(on_floor, 0.0, -1.0)]
    index = np.flatnonzero(which >= 0)
    point = tuple(view[i] + t[index] * direction[i][index] for i in range(3))
    for axis, values in zip(normal, normals(tables, which[index], point)):
        axis[index] = values
    right, up, forward = (tuple(view[axis]) for axis in (VIEW_RIGHT, VIEW_UP, VIEW_FORWARD))
    seen = np.stack([dot(normal, right), -dot(normal, up), dot(normal, forward)], 1)
    ids = np.zeros(len(t), np.uint8)
    ids[index] = tables.solids[which[index], s.THING] + 1
    return (
        ids.reshape(shape),
        depth.astype(np.float32).reshape(shape),
        seen.astype(np.float32).reshape(*shape, 3),
        covered,
    )
