"""Perception maps scored against the exact ones. Each score is from 0 to 1; the measures go with it."""

from collections.abc import Sequence

import cv2
import numpy as np

from uniworld.data.scenes import perception
from uniworld.data.scenes.perception_items import Perception
from uniworld.data.scenes.render import Rendered, render
from uniworld.eval.scenes_boxes import read_boxes
from uniworld.eval.scenes_compare import fitted

EDGE_LEVEL = 64  # of 255: from here on a pixel is an edge; a thin line that is slightly blurred still is
EDGE_REACH_PX = 2  # at 128 pixels: so far off an edge may lie
JOINT_REACH_PX, JOINT_NEAR_PX, PATCH_PX = 16, 4, 7  # at 128 pixels: searched, near enough, and of what is compared
PATCH_UNLIKE = 0.5  # of a patch's energy: beyond, the joint is not there
NORMAL_NEAR_DEG = 11.25
DEPTH_NEAR = 0.02  # relative
BOX_IOU = 0.5
FRAME_TINT = 100  # by how much red and blue exceed green in a frame; in a purple thing by 88

Measures = dict[str, float]


def score_map(item: Perception, picture: np.ndarray, size_px: int = 128) -> tuple[float, Measures]:
    """The score of what was drawn for a perception task, uint8 [H, W, 3] of any size, and its measures by name."""
    rendered = render(item.scene, size_px)
    picture = fitted(picture, size_px)
    if item.task in ("segment", "detect"):
        target = item.target or tuple(range(len(item.scene.things)))
        return POINTED[item.task](rendered, target, picture)
    expected = perception.draw(rendered, item.task)
    return SCORED[item.task](rendered, expected, picture)


def edge_f1(expected: np.ndarray, found: np.ndarray, reach_px: int) -> float:
    """F1 of two bool [H, W] edge maps, where an edge may lie reach_px off."""
    if not expected.any() or not found.any():
        return float(expected.any() == found.any())
    near = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach_px + 1, 2 * reach_px + 1))
    precision = found[cv2.dilate(expected.astype(np.uint8), near) > 0].sum() / found.sum()
    recall = expected[cv2.dilate(found.astype(np.uint8), near) > 0].sum() / expected.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def _edges(_: Rendered, expected: np.ndarray, picture: np.ndarray) -> tuple[float, Measures]:
    found, true = picture.mean(-1) > EDGE_LEVEL, expected.mean(-1) > EDGE_LEVEL
    score = edge_f1(true, found, _scaled(EDGE_REACH_PX, len(picture)))
    return score, {"f1": score}


def _sketch(_: Rendered, expected: np.ndarray, picture: np.ndarray) -> tuple[float, Measures]:
    """Dark lines on white."""
    return _edges(_, 255 - expected, 255 - picture)


def _depth(rendered: Rendered, expected: np.ndarray, picture: np.ndarray) -> tuple[float, Measures]:
    """Over the things: floor and wall lie at the same depth in every scene."""
    there = rendered.ids > 0
    true = perception.read_depth(expected)
    error = np.abs(perception.read_depth(picture) - true)
    relative = (error / true)[there]
    measures = {"abs rel": float(relative.mean()), "abs": float(error[there].mean())}
    return float((relative <= DEPTH_NEAR).mean()), measures


def _normal(rendered: Rendered, expected: np.ndarray, picture: np.ndarray) -> tuple[float, Measures]:
    cosine = (perception.read_normal(expected) * perception.read_normal(picture)).sum(-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))[rendered.ids > 0]
    return float((angle <= NORMAL_NEAR_DEG).mean()), {"degrees": float(angle.mean())}


def _pose(rendered: Rendered, expected: np.ndarray, picture: np.ndarray) -> tuple[float, Measures]:
    """Joints are found by what the map shows around them: the nearest place that looks like it."""
    errors = [
        joint_error(expected, picture, joint[:2])
        for joints in rendered.joints.values()
        for joint in joints
        if ((joint[:2] >= 0) & (joint[:2] < len(picture))).all()
    ]
    near = np.array(errors) <= _scaled(JOINT_NEAR_PX, len(picture))
    return float(near.mean()), {"px": float(np.mean(errors))}


def joint_error(expected: np.ndarray, picture: np.ndarray, joint: Sequence[float]) -> float:
    """Pixels between a joint, in x and y, and the place in a picture that looks like its surroundings; the farthest
    that is searched where no place does."""
    reach, half = _scaled(JOINT_REACH_PX, len(picture)), _scaled(PATCH_PX, len(picture)) // 2
    x, y = (int(round(v - 0.5)) for v in joint)
    patch = _around(expected, x, y, half)
    window = _around(picture, x, y, half + reach)
    unlike = cv2.matchTemplate(window, patch, cv2.TM_SQDIFF)
    unlike = unlike / max(float(np.square(patch).sum()), 1.0)
    place = np.unravel_index(int(unlike.argmin()), unlike.shape)
    if unlike[place] > PATCH_UNLIKE:
        return float(reach)
    return float(min(np.hypot(place[0] - reach, place[1] - reach), reach))


def _around(picture: np.ndarray, x: int, y: int, half: int) -> np.ndarray:
    padded = cv2.copyMakeBorder(picture, half, half, half, half, cv2.BORDER_CONSTANT)
    return padded[y : y + 2 * half + 1, x : x + 2 * half + 1].astype(np.float32)


def _segment(rendered: Rendered, target: Sequence[int], picture: np.ndarray) -> tuple[float, Measures]:
    true, found = perception.mask_of(rendered, target), perception.read_mask(picture)
    iou = float((true & found).sum() / max((true | found).sum(), 1))
    return iou, {"iou": iou}


def _detect(rendered: Rendered, target: Sequence[int], picture: np.ndarray) -> tuple[float, Measures]:
    width = perception.frame_px(len(picture))
    boxes = [box for box in (perception.box_of(rendered, i) for i in target) if box is not None]
    last = len(picture) - 1
    true = [
        (max(b[0] - width, 0), max(b[1] - width, 0), min(b[2] + width, last), min(b[3] + width, last)) for b in boxes
    ]
    found = read_boxes(frame_mask(picture), width)
    ious = matched(true, found)
    score = 2 * sum(iou >= BOX_IOU for iou in ious) / max(len(true) + len(found), 1)
    return float(score), {"f1": float(score), "iou": float(np.mean(ious or [0.0]))}


def frame_mask(picture: np.ndarray) -> np.ndarray:
    """bool [H, W]: where frames may be; unlike the colour of segments, thin lines of it fade when they are blurred."""
    red, green, blue = (picture[..., i].astype(np.int16) for i in range(3))
    return np.minimum(red, blue) - green > FRAME_TINT


def matched(true: Sequence[tuple], found: Sequence[tuple]) -> list[float]:
    """The IoU of every true box with the found one that it is paired with, the best pairs first; 0 without one."""
    pairs = sorted(((box_iou(a, b), i, j) for i, a in enumerate(true) for j, b in enumerate(found)), reverse=True)
    ious, taken = [0.0] * len(true), set()
    for iou, i, j in pairs:
        if not ious[i] and j not in taken:
            ious[i] = iou
            taken.add(j)
    return ious


def box_iou(a: Sequence[int], b: Sequence[int]) -> float:
    """Of two boxes left, top, right, bottom, in pixels, right and bottom included."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return both / (sum(areas) - both)


def _scaled(pixels: int, size_px: int) -> int:
    return max(round(pixels * size_px / 128), 1)


SCORED = {
    "canny": _edges,
    "hed": _edges,
    "mlsd": _edges,
    "sketch": _sketch,
    "depth": _depth,
    "normal": _normal,
    "pose": _pose,
}
POINTED = {"segment": _segment, "detect": _detect}
