"""The scenes' renderer against references of its own: closed forms, a separate camera, and dense sampling of rays."""

import dataclasses
import hashlib
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
from scene_shapes import FLOOR_X, FLOOR_Z, is_inside

from uniworld.data.scenes import solids, surfaces, tracing
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    PLAIN,
    POSES,
    SHAPES,
    SIZE_RADIUS,
    STYLES,
    Scene,
    Thing,
)
from uniworld.data.scenes.render import picture_of, render
from uniworld.data.scenes.sampling import sample_scene
from uniworld.kernels import extension

PITCH, TAN_HALF_FOV, EYE = math.radians(22), 0.30, np.array([0.0, 3.9, -6.2])


def one_of_each(**fields) -> Scene:
    """All seven shapes and all five materials, apart from each other."""
    places = [(-0.9, 0.1), (-0.3, 0.1), (0.3, 0.1), (0.9, 0.1), (-0.8, 0.9), (0.0, 0.9), (0.8, 0.9)]
    colours = tuple(COLOURS)
    things = tuple(
        Thing(
            shape=shape,
            colour=colours[i],
            material=MATERIALS[(i + 2) % len(MATERIALS)],
            size="small",
            x=x,
            z=z,
            yaw=17.0 * i - 40,
            pose=POSES["waving"] if shape == "doll" else (),
        )
        for i, (shape, (x, z)) in enumerate(zip(SHAPES, places))
    )
    return Scene(things=things, **fields)


def pixel_rays(size: int) -> np.ndarray:
    """Directions [H, W, 3] with unit length along the view, from the camera's own rotation about X."""
    steps = (2 * (np.arange(size) + 0.5) / size - 1) * TAN_HALF_FOV
    u, v = np.meshgrid(steps, steps)
    turn = np.array([[1, 0, 0], [0, -math.cos(PITCH), -math.sin(PITCH)], [0, -math.sin(PITCH), math.cos(PITCH)]])
    return np.stack([u, v, np.ones_like(u)], -1) @ turn


def pinhole(points: np.ndarray, size: int) -> np.ndarray:
    """World points [N, 3] to pixels [N, 2] by intrinsics times extrinsics."""
    turn = np.array([[1, 0, 0], [0, -math.cos(PITCH), -math.sin(PITCH)], [0, -math.sin(PITCH), math.cos(PITCH)]])
    focal = size / 2 / TAN_HALF_FOV
    k = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    image = (points - EYE) @ turn.T @ k.T
    return image[:, :2] / image[:, 2:]


def lab(rgb) -> np.ndarray:
    return cv2.cvtColor(np.atleast_3d(np.float32(rgb) / 255), cv2.COLOR_RGB2LAB)


def digest(scene: Scene) -> str:
    drawn = render(scene, 64)
    parts = (drawn.image, drawn.ids, drawn.depth, drawn.normal)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_a_fresh_process_draws_the_same_bytes():
    scenes = [one_of_each(style=style, background=b, seed=3) for style, b in zip(STYLES, BACKGROUNDS)]
    code = (
        "from uniworld.data.scenes.graph import Scene, Thing\n"
        "from uniworld.data.scenes.render import render\nimport hashlib\n"
        f"for s in {scenes!r}:\n"
        "    d = render(s, 64)\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in (d.image, d.ids, d.depth, d.normal))).hexdigest())\n"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert fresh == [digest(scene) for scene in scenes]
    assert len(set(fresh)) == len(scenes)


def test_a_ball_has_the_depth_and_normal_of_the_closed_form():
    thing = Thing(shape="ball", colour="red", size="large", x=0.2, z=0.3)
    drawn = render(Scene(things=(thing,)), 128)
    centre, radius = np.array([0.2 * FLOOR_X, SIZE_RADIUS["large"], 0.3 * FLOOR_Z]), SIZE_RADIUS["large"]
    rays = pixel_rays(128)
    a, b, c = (rays**2).sum(-1), rays @ (EYE - centre), ((EYE - centre) ** 2).sum() - radius**2
    disc = b * b - a * c
    assert ((disc > 0) == (drawn.ids == 1)).all()
    on = disc > 0
    t = (-b[on] - np.sqrt(disc[on])) / a[on]  # the ray has unit length along the view: t is the depth
    np.testing.assert_allclose(drawn.depth[on], t, rtol=1e-6)
    normal = (EYE + t[:, None] * rays[on] - centre) / radius
    camera_axes = np.array([[1, 0, 0], [0, -math.cos(PITCH), -math.sin(PITCH)], [0, -math.sin(PITCH), math.cos(PITCH)]])
    np.testing.assert_allclose(drawn.normal[on], normal @ camera_axes.T, atol=1e-6)


def test_floor_and_wall_have_their_depths():
    drawn, rays = render(Scene(things=()), 64), pixel_rays(64)
    to_wall = (4.6 - EYE[2]) / rays[..., 2]
    to_floor = np.where(rays[..., 1] < 0, -EYE[1] / np.minimum(rays[..., 1], -1e-12), np.inf)
    np.testing.assert_allclose(drawn.depth, np.minimum(to_wall, to_floor), rtol=1e-6)


@pytest.mark.parametrize("shape", ["cube", "pyramid"])
def test_corners_project_where_another_camera_says(shape):
    thing = Thing(shape=shape, colour="blue", size="large", x=-0.3, z=0.4, yaw=31.0)
    if shape == "cube":
        corners = [(x, 0.8 + y, z) for x in (-0.8, 0.8) for y in (-0.8, 0.8) for z in (-0.8, 0.8)]
    else:
        corners = [(-0.9, 0, -0.9), (0.9, 0, -0.9), (0.9, 0, 0.9), (-0.9, 0, 0.9), (0, 1.75, 0)]
    c, s = math.cos(math.radians(31)), math.sin(math.radians(31))
    p = np.array(corners) * SIZE_RADIUS["large"]
    world = np.stack([c * p[:, 0] + s * p[:, 2], p[:, 1], -s * p[:, 0] + c * p[:, 2]], 1)
    pixels = pinhole(world + np.array([-0.3 * FLOOR_X, 0, 0.4 * FLOOR_Z]), 128)
    hull = cv2.convexHull(pixels.astype(np.float32))
    inside = [[cv2.pointPolygonTest(hull, (x + 0.5, y + 0.5), True) for x in range(128)] for y in range(128)]
    clear = np.abs(inside) > 1e-3
    ids = render(Scene(things=(thing,)), 128).ids
    assert ((np.array(inside) > 0) == (ids == 1))[clear].all()
    assert clear.mean() > 0.99


def test_the_picture_alone_has_the_same_bytes():
    scenes = [one_of_each(style=style, background=b, seed=6) for style, b in zip(STYLES, BACKGROUNDS)]
    for scene in (*scenes, one_of_each(background=PLAIN)):
        assert np.array_equal(picture_of(scene, 64), render(scene, 64).image)
    with pytest.raises(ValueError, match="size_px=100"):
        picture_of(scenes[0], 100)


@pytest.mark.parametrize("seed", [0, 1])
def test_ids_and_depth_are_those_of_densely_sampled_rays(seed):
    scene = one_of_each() if seed == 0 else sample_scene(np.random.default_rng(seed), num_things=5)
    size, step = 32, 0.004
    drawn, rays = render(scene, size), pixel_rays(size).reshape(-1, 3)
    depths = np.arange(4.0, 11.0, step)
    first, nearest = np.zeros(size * size, int), np.full(size * size, np.inf)
    for i, thing in enumerate(scene.things):
        (x0, y0), (x1, y1) = _reach(thing, size)
        rows = [r for r in range(size * size) if x0 <= r % size <= x1 and y0 <= r // size <= y1]
        inside = is_inside(thing, EYE + depths[:, None, None] * rays[rows])
        t = np.where(inside.any(0), depths[inside.argmax(0)], np.inf)
        closer = t < nearest[rows]
        first[rows], nearest[rows] = np.where(closer, i + 1, first[rows]), np.where(closer, t, nearest[rows])
    ids, depth = drawn.ids.ravel(), drawn.depth.ravel()
    agree = ids == first
    assert agree.mean() > 0.997  # a ray may pass through a corner between two samples
    hit = agree & (first > 0)
    assert hit.sum() > 30
    assert np.abs(depth[hit] - nearest[hit]).max() <= step * 1.01


def _reach(thing: Thing, size: int) -> np.ndarray:
    """A generous box of pixels around a thing."""
    x, z, r = thing.x * FLOOR_X, thing.z * FLOOR_Z, SIZE_RADIUS[thing.size]
    corners = [(x + a * 2.2 * r, y * r, z + b * 2.2 * r) for a in (-1, 1) for b in (-1, 1) for y in (-0.1, 3.7)]
    pixels = pinhole(np.array(corners), size)
    return np.array([pixels.min(0) - 1, pixels.max(0) + 1])


@pytest.mark.skipif(not extension.has("scene_picture"), reason="the C++ core is not built")
@pytest.mark.parametrize("scene", [one_of_each(background=b, light=l) for b, l in zip(("studio", "snow"), LIGHTS)])
def test_the_core_and_numpy_give_the_same_bytes(scene, monkeypatch):
    with_core = [render(dataclasses.replace(scene, background=b), 64) for b in (scene.background, "tiles")]
    monkeypatch.setattr(extension, "has", lambda name: False)
    for drawn in with_core:
        plain = render(drawn.scene, 64)
        for name in ("image", "ids", "depth", "normal"):
            assert (getattr(drawn, name) == getattr(plain, name)).all(), name


def test_a_torus_blocks_the_rays_whose_quartic_has_a_root_on_the_way():
    rng = np.random.default_rng(0)
    thing = Thing(shape="torus", colour="red", size="large", x=0.0, z=0.0)
    row = solids.tables(Scene(things=(thing,))).solids[0]
    major, minor = row[solids.DIMS][:2]
    origins, directions = rng.uniform(-0.9, 0.9, (600, 3)), rng.normal(size=(600, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    world = origins + row[solids.CENTRE]
    found = tracing.blocks(row, np.empty((0, 4)), tuple(world.T), tuple(directions.T))
    expected, sure = [], []
    for o, d in zip(origins, directions):
        square = np.polynomial.Polynomial([o @ o + major**2 - minor**2, 2 * o @ d, 1.0])
        flat = np.polynomial.Polynomial([o[0] ** 2 + o[1] ** 2, 2 * (o[0] * d[0] + o[1] * d[1]), d[0] ** 2 + d[1] ** 2])
        roots = (square**2 - 4 * major**2 * flat).roots()
        real = roots[np.abs(roots.imag) < 1e-9].real
        outside = (math.hypot(o[0], o[1]) - major) ** 2 + o[2] ** 2 > minor**2
        expected.append(bool((real > 0).any()))
        sure.append(outside and not ((np.abs(roots.imag) < 1e-5) & (np.abs(roots.imag) > 1e-9)).any())
    assert sum(sure) > 400 and 0.1 < np.mean(np.array(expected)[sure]) < 0.6
    assert (found == np.array(expected))[sure].all()


def test_a_thing_changes_nothing_beyond_itself_and_its_shadow():
    near = Thing(shape="cone", colour="red", material="glossy", size="medium", x=-0.8, z=0.2)
    far = Thing(shape="doll", colour="green", size="medium", x=0.8, z=0.6)
    for light in LIGHTS:
        both = Scene(things=(near, far), light=light, background="meadow")
        changed = (render(both, 128).image != render(both.without_thing(1), 128).image).any(-1)
        assert changed[:, 64:].any() and not changed[:, :48].any()


def test_another_colour_changes_only_the_pixels_of_the_thing():
    scene = one_of_each().with_thing(3, material="matte")
    without_mirrors = dataclasses.replace(
        scene, things=tuple(dataclasses.replace(t, material="matte") for t in scene.things)
    )
    before = render(without_mirrors, 128)
    after = render(without_mirrors.with_thing(3, colour="white"), 128)
    changed = (before.image != after.image).any(-1)
    around = cv2.dilate((before.ids == 4).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert changed[before.ids == 4].all() and not changed[~around].any()
    assert (before.depth == after.depth).all()


@pytest.mark.parametrize("light", LIGHTS)
def test_the_floor_is_dark_in_the_middle_of_a_shadow_only(light):
    thing = Thing(shape="ball", colour="red", size="large", x=0.0, z=0.5)
    tables = solids.tables(Scene(things=(thing,)))
    row, rays, _ = surfaces.light_rows(light)
    centre, radius = np.array([0, SIZE_RADIUS["large"], 0.5 * FLOOR_Z]), SIZE_RADIUS["large"]
    x, z = (grid.ravel() for grid in np.meshgrid(np.linspace(-3, 3, 61), np.linspace(-1, 4, 51)))
    share = tracing.lit_share(tables, row, rays, (x, 0 * x, z), np.full(x.size, -1))
    # How far the line to the sun's middle passes from the ball, and how wide the sun is there.
    to_ball = centre - np.stack([x, 0 * x, z], 1)
    along = to_ball @ row[:3]
    miss = np.sqrt(np.maximum((to_ball**2).sum(1) - along**2, 0))
    wide = row[10] * (along + 0.2)
    touches = np.hypot(x, z - centre[2]) < 0.05  # where the ball stands
    dark, bright = (along > 0) & (miss < radius - wide) & ~touches, (miss > radius + wide) | (along < 0)
    assert dark.any() and (share[dark] == 0).all() and (share[bright] == 1).all()
    assert ((share > 0) & (share < 1)).any()


def test_every_colour_stays_nearest_to_its_name():
    names, wrong = list(COLOURS), []
    named = lab([list(COLOURS.values())])[0]
    for i, (colour, material, light) in enumerate((c, m, l) for c in COLOURS for m in MATERIALS for l in LIGHTS):
        thing = Thing(shape=SHAPES[i % 7], colour=colour, material=material, size=("small", "large")[i % 2], yaw=20.0)
        drawn = render(Scene(things=(thing,), light=light, background=BACKGROUNDS[i % 8]), 64)
        mean = lab(drawn.image)[drawn.ids == 1].mean(0)
        nearest = names[int(np.linalg.norm(named - mean, axis=1).argmin())]
        if nearest != colour:
            wrong.append((colour, nearest, material, light, thing.shape))
    assert len(wrong) <= 3, wrong  # of 300


def test_colours_are_far_apart():
    named = lab([list(COLOURS.values())])[0]
    distances = np.linalg.norm(named[:, None] - named[None], axis=-1) + 1e3 * np.eye(len(named))
    assert distances.min() > 35


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_fixed_filters_of_local_reach(style):
    things = (Thing(shape="ball", colour="red", x=-0.8), Thing(shape="cube", colour="blue", x=0.8))
    scene = Scene(things=things, style=style, background="desert")
    drawn, photo = render(scene, 128), render(dataclasses.replace(scene, style="photo"), 128)
    assert (drawn.image == render(scene, 128).image).all() and (drawn.ids == photo.ids).all()
    difference = np.abs(drawn.image.astype(int) - photo.image).mean()
    assert difference == 0 if style == "photo" else 3 < difference < 110
    moved = render(scene.with_thing(1, colour="yellow"), 128)
    assert not (moved.image != drawn.image)[:, :56].any()
    assert (drawn.image != moved.image).any() or style == "pencil sketch"
    if style in ("black and white", "pencil sketch"):
        assert (drawn.image[..., 0] == drawn.image[..., 2]).all()
    if style == "pixel art":
        assert (drawn.image[0::4] == drawn.image[3::4]).all()


@pytest.mark.parametrize("size_px", [16, 48, 128, 256])
def test_any_multiple_of_16(size_px):
    drawn = render(one_of_each(background="beach"), size_px)
    assert drawn.image.shape == drawn.normal.shape == (size_px, size_px, 3)
    assert drawn.image.dtype == np.uint8 and drawn.depth.dtype == drawn.normal.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn.normal, axis=-1), 1, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="size_px=100: must be a positive multiple of 16"):
        render(Scene(things=()), 100)
    with pytest.raises(ValueError, match="colour='mauve': must be one of red"):
        Thing(shape="ball", colour="mauve")
    with pytest.raises(ValueError, match="x=1.5: must be from -1 to 1"):
        Thing(shape="ball", colour="red", x=1.5)
    with pytest.raises(ValueError, match="pose"):
        Thing(shape="ball", colour="red", pose=POSES["waving"])
    with pytest.raises(ValueError, match="light='noon'"):
        Scene(things=(), light="noon")


def test_the_rows_of_a_thing_are_kept_and_stay_its_own():
    """A thing has the same rows wherever it stands in a scene, but for its number and where its rows begin."""
    doll = Thing(shape="doll", colour="red", x=-0.5, pose=POSES["standing"])
    dotted, cube = Thing(shape="ball", colour="blue", material="dotted"), Thing(shape="cube", colour="green", x=0.6)
    orders = [(doll, dotted, cube), (cube, doll, dotted), (dotted, cube, doll)]
    for order in orders:
        made = solids.tables(Scene(things=order))
        alone = [solids.tables(Scene(things=(thing,))) for thing in order]
        starts = {name: np.cumsum([0, *(len(getattr(t, name)) for t in alone)]) for name in solids.WIDTHS}
        for index, one in enumerate(alone):
            one.solids[:, solids.THING], one.feet[:, 0] = index, index
            one.solids[:, solids.PLANE_START] += starts["planes"][index]
            one.things[:, solids.DOT_START] = starts["dots"][index]
            one.things[:, solids.SOLID_START] = starts["solids"][index]
            for name in solids.WIDTHS:
                rows = getattr(made, name)[starts[name][index] : starts[name][index + 1]]
                np.testing.assert_array_equal(rows, getattr(one, name))
        assert list(made.joints) == [order.index(doll)]
        made.solids[:], made.dots[:] = 0, 0  # what is given away is a copy
