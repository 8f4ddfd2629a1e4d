"""Perception targets of scenes: what they show is read back and compared with the geometry."""

import dataclasses
import math

import cv2
import numpy as np
import pytest

from uniworld.data.scenes import perception
from uniworld.data.scenes.doll import JOINT_NAMES
from uniworld.data.scenes.graph import POSES, SIZE_RADIUS, Scene, Thing
from uniworld.data.scenes.lines import visible_lines
from uniworld.data.scenes.render import render
from uniworld.data.scenes.sampling import sample_scene
from uniworld.models.prompts import PERCEPTION_PROMPTS

CUBE = Thing(shape="cube", colour="blue", size="large", x=0.5, z=0.3, yaw=30.0)
DOLL = Thing(shape="doll", colour="red", size="large", x=-0.5, z=0.4, pose=POSES["waving"])
SCENE = Scene(things=(CUBE, DOLL), background="meadow")


@pytest.fixture(scope="module")
def drawn():
    return render(SCENE, 128)


@pytest.fixture(scope="module")
def several():
    rng = np.random.default_rng(4)
    return [render(sample_scene(rng), 128) for _ in range(12)]


def test_every_task_of_the_prompts_can_be_drawn(drawn):
    assert tuple(PERCEPTION_PROMPTS) == perception.TASKS
    pictures = [perception.draw(drawn, task) for task in perception.TASKS]
    for picture in pictures:
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert (picture != pictures[0]).any() or picture is pictures[0]
    again = [perception.draw(render(SCENE, 128), task) for task in perception.TASKS]
    assert all((a == b).all() for a, b in zip(pictures, again))


def test_depth_is_read_back(several):
    for drawn in several:
        picture = perception.draw(drawn, "depth")
        assert picture.min() > 0 and picture.max() < 255  # nothing is beyond the range
        step = drawn.depth**2 * (1 / perception.NEAR - 1 / perception.FAR) / 255 / 2
        assert (np.abs(perception.read_depth(picture) - drawn.depth) <= 1.05 * step + 1e-4).all()
    assert (picture[..., 0] == picture[..., 2]).all()


def test_normals_are_read_back(several):
    for drawn in several:
        read = perception.read_normal(perception.draw(drawn, "normal"))
        angle = np.degrees(np.arccos(np.clip((read * drawn.normal).sum(-1), -1, 1)))
        assert angle.max() < 0.6
    floor = perception.draw(render(Scene(things=()), 64), "normal")[-1, 0].astype(int)
    up = np.array([0, math.cos(math.radians(22)), math.sin(math.radians(22))])  # y up, z to the viewer
    assert np.abs(floor - (up + 1) * 127.5).max() <= 1


def test_masks_are_read_back_and_nothing_else_looks_like_one(several):
    for drawn in several:
        assert perception.read_mask(drawn.image).sum() <= 4  # glints on purple metal
        for i in range(len(drawn.scene.things)):
            picture = perception.draw(drawn, "segment", (i,))
            assert (perception.read_mask(picture) != (drawn.ids == i + 1)).sum() <= 4
            assert (picture == drawn.image)[drawn.ids != i + 1].all()
        everything = perception.draw(drawn, "segment")
        assert (perception.read_mask(everything) == (drawn.ids > 0)).all()


def test_boxes_are_read_back_and_nothing_else_looks_like_one(several):
    width = perception.frame_px(128)
    for drawn in several:
        assert perception.read_boxes(drawn.image) == []
        for i in range(len(drawn.scene.things)):
            (box,) = perception.read_boxes(perception.draw(drawn, "detect", (i,)))
            y, x = np.nonzero(drawn.ids == i + 1)
            expected = (x.min() - width, y.min() - width, x.max() + width, y.max() + width)
            assert box == tuple(int(v) for v in np.clip(expected, 0, 127))
            picture = perception.draw(drawn, "detect", (i,))
            inside = (picture == drawn.image)[box[1] + width : box[3] + 1 - width, box[0] + width : box[2] + 1 - width]
            assert inside.all()


def test_canny_is_that_of_opencv(drawn):
    grey = cv2.cvtColor(drawn.image, cv2.COLOR_RGB2GRAY)
    assert (perception.draw(drawn, "canny")[..., 0] == cv2.Canny(grey, 100, 200)).all()


def test_joints_lie_in_the_doll(drawn):
    joints = drawn.joints[1]
    assert joints.shape == (len(JOINT_NAMES), 3) and list(drawn.joints) == [1]
    alone = render(Scene(things=(DOLL,)), 128)
    ids = cv2.dilate((alone.ids == 1).astype(np.uint8), np.ones((3, 3), np.uint8))
    for x, y, _ in joints:
        assert ids[int(y), int(x)]
    right, left = JOINT_NAMES.index("right wrist"), JOINT_NAMES.index("left wrist")
    assert joints[right, 0] < joints[left, 0]  # it faces the viewer
    assert joints[right, 1] < joints[JOINT_NAMES.index("nose"), 1] + 4 < joints[left, 1]  # and waves with its right
    picture = perception.draw(drawn, "pose")
    near = np.zeros((128, 128), np.uint8)
    for a, b in perception.LIMBS:
        cv2.line(near, joints[a, :2].astype(int).tolist(), joints[b, :2].astype(int).tolist(), 1, 7)
    assert picture.any(-1).sum() > 60 and not picture[near == 0].any()


def test_a_pose_needs_a_doll():
    empty = render(Scene(things=(CUBE,)), 32)
    assert not perception.has_pose(empty)
    with pytest.raises(ValueError, match="task=pose: the scene has no doll"):
        perception.draw(empty, "pose")


def test_the_straight_lines_of_a_cube_are_its_visible_edges():
    drawn = render(Scene(things=(CUBE,), background="studio"), 256)
    lines = visible_lines(drawn)
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    half = 0.8 * SIZE_RADIUS["large"]
    edges = []
    for axis in range(3):
        for u in (-half, half):
            for v in (-half, half):
                ends = [np.insert([u, v], axis, w) for w in (-half, half)]
                edges.append(tuple(_project(e, c, s, half) for e in ends))
    assert 8 <= len(lines) <= 9  # of twelve: the three at the hidden corner are not seen
    for a, b in lines:
        assert min(max(_off(a, p, q), _off(b, p, q)) for p, q in edges) < 1e-6


def _project(p: np.ndarray, c: float, s: float, half: float) -> np.ndarray:
    x, y, z = c * p[0] + s * p[2] + 0.5 * 1.4, p[1] + half - 3.9, -s * p[0] + c * p[2] + 0.3 * 2.6 + 6.2
    k, j = math.cos(math.radians(22)), math.sin(math.radians(22))
    return 128 + 128 / 0.30 * np.array([x, -(k * y + j * z)]) / (k * z - j * y)


def _off(point: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """Pixels from a point to the line through p and q."""
    d = (q - p) / np.linalg.norm(q - p)
    return abs(d[0] * (point[1] - p[1]) - d[1] * (point[0] - p[0]))


def test_the_horizon_is_a_straight_line_but_where_things_hide_it():
    tall = Thing(shape="doll", colour="red", size="large", x=0.0, z=0.6)
    drawn = render(Scene(things=(tall,), background="snow"), 128)
    row = _project(np.array([0.0, 0.0, 4.6 - 0.78]), 1.0, 0.0, 0.0)[1] / 2  # it is for 256 pixels
    lines = visible_lines(drawn)
    assert len(lines) >= 2 and all(a[1] == pytest.approx(row) == b[1] for a, b in lines)
    hidden = {x for x in range(128) if drawn.ids[int(row), x]}
    shown = {x for a, b in lines for x in range(int(a[0]) + 1, int(b[0]))}
    assert len(hidden) > 5 and not hidden & shown and len(shown) > 85


@pytest.mark.parametrize("shape", ["cylinder", "cone"])
def test_the_outlines_of_round_bodies_are_tangents(shape):
    thing = Thing(shape=shape, colour="red", size="large", x=-0.4, z=0.5)
    drawn = render(Scene(things=(thing,), background="studio"), 256)
    lines = visible_lines(drawn)
    assert len(lines) == 2
    middle = np.mean([end for line in lines for end in line], axis=0)
    for a, b in lines:
        for share in (0.2, 0.5, 0.8):
            point = a + share * (b - a)
            step = np.array([1.5 if point[0] < middle[0] else -1.5, 0])
            inner, outer = point + step, point - step
            assert drawn.ids[int(inner[1]), int(inner[0])] == 1 and drawn.ids[int(outer[1]), int(outer[0])] == 0


def test_edges_are_where_things_end(several):
    for drawn in several:
        outline = cv2.morphologyEx(drawn.ids, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        inner = cv2.erode((drawn.ids == 0).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        hed, sketch = (perception.draw(drawn, task)[..., 0].astype(int) for task in ("hed", "sketch"))
        assert hed[outline].mean() > 100 and hed[inner].mean() < 25
        darkest = cv2.erode(sketch.astype(np.uint8), np.ones((3, 3), np.uint8))
        assert darkest[outline].mean() < 110 and sketch[inner].mean() > 245


def test_mistakes_are_named(drawn):
    with pytest.raises(ValueError, match="task='thermal': must be one of canny, depth"):
        perception.draw(drawn, "thermal")
    with pytest.raises(ValueError, match=r"target=\(0,\): only the tasks segment and detect take a target"):
        perception.draw(drawn, "depth", (0,))
    with pytest.raises(ValueError, match="target=7: the scene has 2 things"):
        perception.draw(drawn, "detect", (7,))


def test_targets_do_not_depend_on_the_style(drawn):
    painted = render(dataclasses.replace(SCENE, style="cartoon"), 128)
    for task in ("depth", "normal", "mlsd", "pose"):
        assert (perception.draw(painted, task) == perception.draw(drawn, task)).all(), task
