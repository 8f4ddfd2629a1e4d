"""Rays against solids, in NumPy: the definition of what `csrc/scene_render.cpp` computes, bit for bit.

Both use only + - * / and square roots of float64, in the same order, so that a picture has the same bytes with and
without the C++ core. A vector is a tuple of three arrays; letters: M rays or points, S, T, F rows of the tables.
"""

import numpy as np

from uniworld.data.scenes import shapes
from uniworld.data.scenes import solids as s

EPSILON = 1e-9
MARCH_STEPS, MARCH_HIT, MARCH_NEAR = 64, 1e-6, 1e-3  # of the torus: steps, a hit, and a hit when out of steps

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]


def dot(a: Vector, b: Vector) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def plus(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def times(k, a: Vector) -> Vector:
    return k * a[0], k * a[1], k * a[2]


def unit(a: Vector) -> Vector:
    length = np.sqrt(dot(a, a))
    return a[0] / length, a[1] / length, a[2] / length


def take(a: Vector, index) -> Vector:
    return a[0][index], a[1][index], a[2][index]


def to_axes(row: np.ndarray, v: Vector) -> Vector:
    """A direction of the world in the solid's own axes."""
    r = row[s.AXES]
    return dot(r[0:3], v), dot(r[3:6], v), dot(r[6:9], v)


def from_axes(row: np.ndarray, v: Vector) -> Vector:
    r = row[s.AXES]
    return dot(r[0::3], v), dot(r[1::3], v), dot(r[2::3], v)


def hit(row: np.ndarray, planes: np.ndarray, origin: Vector, direction: Vector) -> np.ndarray:
    """Distance [M] along unit rays to the solid of this row; infinite where it is missed."""
    o = to_axes(row, minus(origin, tuple(row[s.CENTRE])))
    d = to_axes(row, direction)
    kind = int(row[s.KIND])
    if kind == shapes.ELLIPSOID:
        return _hit_ellipsoid(row[s.DIMS], o, d)
    if kind == shapes.PLANES:
        start = int(row[s.PLANE_START])
        return _hit_planes(planes[start : start + int(row[s.PLANE_COUNT])], o, d)
    if kind == shapes.CYLINDER:
        return _hit_cylinder(row[s.DIMS], o, d)
    if kind == shapes.CONE:
        return _hit_cone(row[s.DIMS], o, d)
    return _hit_torus(row[s.DIMS], o, d)


def _hit_ellipsoid(dims, o: Vector, d: Vector) -> np.ndarray:
    o = o[0] / dims[0], o[1] / dims[1], o[2] / dims[2]
    d = d[0] / dims[0], d[1] / dims[1], d[2] / dims[2]
    a, b, c = dot(d, d), dot(o, d), dot(o, o) - 1.0
    disc = b * b - a * c
    t = (-b - np.sqrt(np.maximum(disc, 0.0))) / a
    return np.where((disc >= 0.0) & (t > EPSILON), t, np.inf)


def _hit_planes(planes, o: Vector, d: Vector) -> np.ndarray:
    near, far = np.full_like(d[0], -np.inf), np.full_like(d[0], np.inf)
    for plane in planes:
        normal = tuple(plane[:3])
        slope, room = dot(normal, d), plane[3] - dot(normal, o)
        t = room / np.where(slope == 0.0, 1.0, slope)
        near = np.where((slope < 0.0) & (t > near), t, near)
        far = np.where((slope > 0.0) & (t < far), t, far)
        far = np.where((slope == 0.0) & (room < 0.0), -np.inf, far)
    return np.where((near <= far) & (near > EPSILON), near, np.inf)


def _hit_cylinder(dims, o: Vector, d: Vector) -> np.ndarray:
    radius, half = dims[0], dims[1]
    a = d[0] * d[0] + d[2] * d[2]
    b = o[0] * d[0] + o[2] * d[2]
    c = o[0] * o[0] + o[2] * o[2] - radius * radius
    disc = b * b - a * c
    round_ = a > 1e-14
    safe_a, root = np.where(round_, a, 1.0), np.sqrt(np.maximum(disc, 0.0))
    inside = np.where(c <= 0.0, np.inf, -np.inf)  # of a ray along the axis
    near = np.where(round_, (-b - root) / safe_a, -inside)
    far = np.where(round_, (-b + root) / safe_a, inside)
    flat = d[1] == 0.0
    safe_y = np.where(flat, 1.0, d[1])
    low, high = (-half - o[1]) / safe_y, (half - o[1]) / safe_y
    between = np.where((o[1] <= half) & (o[1] >= -half), np.inf, -np.inf)  # of a ray across the axis
    enter = np.where(flat, -between, np.minimum(low, high))
    leave = np.where(flat, between, np.maximum(low, high))
    near, far = np.maximum(near, enter), np.minimum(far, leave)
    return np.where((disc >= 0.0) & (near <= far) & (near > EPSILON), near, np.inf)


def _hit_cone(dims, o: Vector, d: Vector) -> np.ndarray:
    radius, height = dims[0], dims[1]
    k = radius / height
    k2, down = k * k, height - o[1]
    a = d[0] * d[0] + d[2] * d[2] - k2 * (d[1] * d[1])
    b = o[0] * d[0] + o[2] * d[2] + k2 * (down * d[1])
    c = o[0] * o[0] + o[2] * o[2] - k2 * (down * down)
    disc = b * b - a * c
    root, safe_a = np.sqrt(np.maximum(disc, 0.0)), np.where(a == 0.0, 1e-30, a)
    best = np.full_like(d[0], np.inf)
    for t in ((-b - root) / safe_a, (-b + root) / safe_a):
        y = o[1] + t * d[1]
        good = (disc >= 0.0) & (t > EPSILON) & (y >= 0.0) & (y <= height) & (t < best)
        best = np.where(good, t, best)
    t = -o[1] / np.where(d[1] == 0.0, 1e-30, d[1])
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    good = (t > EPSILON) & (x * x + z * z <= radius * radius) & (t < best)
    return np.where(good, t, best)


def _torus_distance(dims, p: Vector) -> np.ndarray:
    q = np.sqrt(p[0] * p[0] + p[1] * p[1]) - dims[0]
    return np.sqrt(q * q + p[2] * p[2]) - dims[1]


def _hit_torus(dims, o: Vector, d: Vector) -> np.ndarray:
    """March along the exact distance, from where the ray enters the ball around the ring."""
    reach = dims[0] + dims[1]
    b, c = dot(o, d), dot(o, o) - reach * reach
    disc = b * b - c
    root = np.sqrt(np.maximum(disc, 0.0))
    t, end = np.maximum(-b - root, 0.0), -b + root
    result = np.full_like(d[0], np.inf)
    left = np.flatnonzero((disc >= 0.0) & (end > 0.0))
    for step in range(MARCH_STEPS):
        here = t[left]
        direction = take(d, left)
        distance = _torus_distance(dims, plus(take(o, left), times(here, direction)))
        arrived = distance < (MARCH_HIT if step < MARCH_STEPS - 1 else MARCH_NEAR)
        result[left[arrived]] = here[arrived]
        t[left] = here + distance
        left = left[~arrived & (t[left] <= end[left])]
        if not left.size:
            break
    return result


def blocks(row: np.ndarray, planes: np.ndarray, origin: Vector, direction: Vector) -> np.ndarray:
    """Whether unit rays [M] from outside meet the solid of this row."""
    if int(row[s.KIND]) != shapes.TORUS:
        return hit(row, planes, origin, direction) < np.inf
    return _blocks_torus(row[s.DIMS], to_axes(row, minus(origin, tuple(row[s.CENTRE]))), to_axes(row, direction))


def _blocks_torus(dims, o: Vector, d: Vector) -> np.ndarray:
    """Along the ray, from its point nearest to the middle, the torus is the quartic x^4 + p x^2 + q x + r; Sturm's
    theorem counts its roots between two ends without looking for them."""
    major2, reach = dims[0] * dims[0], dims[0] + dims[1]
    along = dot(o, d)
    disc = along * along - (dot(o, o) - reach * reach)
    high = np.sqrt(np.maximum(disc, 0.0))
    low = np.maximum(along, -high)
    m = minus(o, times(along, d))
    h = dot(m, m) + major2 - dims[1] * dims[1]
    p = 2.0 * h - 4.0 * major2 * (d[0] * d[0] + d[1] * d[1])
    q = -8.0 * major2 * (m[0] * d[0] + m[1] * d[1])
    r = h * h - 4.0 * major2 * (m[0] * m[0] + m[1] * m[1])
    a, b, c = -0.5 * p, -0.75 * q, -r
    k, l = -((0.5 * p) * (a * a) - c * a + b * b), -(0.25 * q * (a * a) + b * c)
    last = -(a * (l * l) - b * (l * k) + c * (k * k))

    def changes(x):
        chain = (((x * x + p) * x + q) * x + r, (x * x + 0.5 * p) * x + 0.25 * q, (a * x + b) * x + c, k * x + l, last)
        negative = [value < 0.0 for value in chain]
        return sum((before != after).astype(np.int64) for before, after in zip(negative, negative[1:]))

    return (disc >= 0.0) & (low < high) & (changes(low) > changes(high))


def normal_at(row: np.ndarray, planes: np.ndarray, point: Vector) -> Vector:
    """Unit outward normals at points [M] on the surface of the solid of this row."""
    p = to_axes(row, minus(point, tuple(row[s.CENTRE])))
    kind, dims = int(row[s.KIND]), row[s.DIMS]
    if kind == shapes.ELLIPSOID:
        n = unit(tuple(v / (r * r) for v, r in zip(p, dims)))
    elif kind == shapes.PLANES:
        start = int(row[s.PLANE_START])
        n = _nearest_plane(planes[start : start + int(row[s.PLANE_COUNT])], p)
    elif kind == shapes.CYLINDER:
        n = _round_normal(p, np.sqrt(p[0] * p[0] + p[2] * p[2]) - dims[0] >= np.abs(p[1]) - dims[1], 0.0)
    elif kind == shapes.CONE:
        n = _round_normal(p, p[1] > 1e-7, dims[0] / dims[1])
    else:
        q = np.sqrt(p[0] * p[0] + p[1] * p[1])
        k = (q - dims[0]) / q
        n = unit((p[0] * k, p[1] * k, p[2]))
    return from_axes(row, n)


def _nearest_plane(planes, p: Vector) -> Vector:
    best, n = np.full_like(p[0], -np.inf), tuple(np.zeros_like(p[0]) for _ in range(3))
    for plane in planes:
        height = dot(tuple(plane[:3]), p) - plane[3]
        nearer = height > best
        best = np.where(nearer, height, best)
        n = tuple(np.where(nearer, value, old) for value, old in zip(plane[:3], n))
    return n


def _round_normal(p: Vector, on_side: np.ndarray, slope: float) -> Vector:
    """Of a cylinder or cone: the side's normal, which rises by `slope`, or the cap's."""
    rho = np.sqrt(p[0] * p[0] + p[2] * p[2])
    rho = np.where(rho == 0.0, 1.0, rho)
    side = unit((p[0] / rho, np.full_like(rho, slope), p[2] / rho))
    cap = np.where(p[1] > 1e-7, 1.0, -1.0)
    return np.where(on_side, side[0], 0.0), np.where(on_side, side[1], cap), np.where(on_side, side[2], 0.0)


def near_ray(centre, radius: float, spread: float, origin: Vector, direction: Vector) -> np.ndarray:
    """Whether a ball may touch a cone of rays [M] about `direction` that widens by `spread` a unit."""
    m = minus(tuple(centre), origin)
    along = dot(m, direction)
    across = dot(m, m) - along * along
    reach = radius + spread * np.maximum(along + radius, 0.0)
    return (along > -radius) & (across <= reach * reach)


def lit_share(tables: s.Tables, light: np.ndarray, rays: np.ndarray, point: Vector, skip: np.ndarray) -> np.ndarray:
    """The share [M] of the sun's disc that points see. `skip` [M]: the thing whose shade does not count, or -1."""
    towards, spread = tuple(light[0:3]), light[10] * 1.05
    blocked = np.zeros((len(rays), len(point[0])), bool)
    for row in tables.solids:
        near = near_ray(row[s.BALL], row[s.BALL_RADIUS], spread, point, towards)
        index = np.flatnonzero(near & (skip != int(row[s.THING])))
        if not index.size:
            continue
        origin = take(point, index)
        for k, ray in enumerate(rays):
            direction = tuple(np.full(len(index), v) for v in ray)
            blocked[k, index] |= blocks(row, tables.planes, origin, direction)
    return 1.0 - blocked.sum(0) / float(len(rays))


def first_hit(
    tables: s.Tables, origin: Vector, direction: Vector, skip: np.ndarray, only_near: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """For rays [M]: the solid that is hit first, or -1, and its distance. `skip` [M]: a thing that is not looked at."""
    best, which = np.full(len(origin[0]), np.inf), np.full(len(origin[0]), -1)
    for k, row in enumerate(tables.solids):
        near = skip != int(row[s.THING])
        if only_near:
            near &= near_ray(row[s.BALL], row[s.BALL_RADIUS], 0.0, origin, direction)
        index = np.flatnonzero(near)
        t = hit(row, tables.planes, take(origin, index), take(direction, index))
        nearer = t < best[index]
        best[index[nearer]], which[index[nearer]] = t[nearer], k
    return which, best
