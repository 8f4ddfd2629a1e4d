"""Perception targets of a rendered scene, as pictures: canny, depth, hed, mlsd, normal, pose, sketch, segment, detect.

Depth, normals, joints, masks, boxes and straight edges come from the geometry and are exact; canny, and the edges of
patterns in hed and sketch, are found in the picture. Segment and detect are drawn on the picture.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from uniworld.data.scenes import contours, doll
from uniworld.data.scenes.graph import check_choice
from uniworld.data.scenes.lines import visible_lines
from uniworld.data.scenes.render import Rendered, fine_contours
from uniworld.models.prompts import PERCEPTION_PROMPTS

TASKS = tuple(PERCEPTION_PROMPTS)
NEAR, FAR = 5.8, 11.5  # depths drawn white and black; brightness is linear in 1 / depth
CANNY_THRESHOLDS = 100, 200
# What is laid over the things of segment, and how much of it shows, and the frames of detect: far from every surface.
MASK_COLOUR, MASK_SHARE = (255, 0, 255), 0.85
SUBPIXEL = 4  # fractional bits of coordinates given to OpenCV

# OpenPose's limbs, as pairs of joints (`doll.JOINT_NAMES`), and its colours of limbs and joints.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
)  # fmt: skip
POSE_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
)  # fmt: skip


def draw(rendered: Rendered, task: str, target: Sequence[int] = ()) -> np.ndarray:
    """The picture of what `task` sees in a rendered scene, uint8 [H, W, 3].

    Args:
        target: of segment and detect, the things meant, by index; empty means all.

    Raises:
        ValueError: an unknown task, a target of a task that takes none, an unknown thing, or a pose without a doll.
    """
    check_choice("task", task, TASKS)
    if task not in ("segment", "detect"):
        if len(target):
            raise ValueError(f"target={tuple(target)}: only the tasks segment and detect take a target")
        return _DRAWN[task](rendered)
    num = len(rendered.scene.things)
    unknown = [i for i in target if not 0 <= i < num]
    if unknown:
        raise ValueError(f"target={unknown[0]}: the scene has {num} things")
    return _DRAWN[task](rendered, target or range(num))


def has_pose(rendered: Rendered) -> bool:
    return bool(rendered.joints)


def mask_of(rendered: Rendered, target: Sequence[int]) -> np.ndarray:
    """bool [H, W]: where one of these things shows."""
    return np.isin(rendered.ids, [i + 1 for i in target])


def box_of(rendered: Rendered, index: int) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom pixel of a thing, right and bottom included; None where it does not show."""
    y, x = np.nonzero(rendered.ids == index + 1)
    return (int(x.min()), int(y.min()), int(x.max()), int(y.max())) if len(y) else None


def read_depth(picture: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the depths that a depth picture shows, world units."""
    share = picture.astype(np.float32).mean(-1) / 255
    return 1 / (share * (1 / NEAR - 1 / FAR) + 1 / FAR)


def read_normal(picture: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3]: the unit normals that a normal picture shows, in camera space."""
    n = (picture.astype(np.float32) / 127.5 - 1) * (1, -1, -1)
    return n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-6)


def read_mask(picture: np.ndarray) -> np.ndarray:
    """bool [H, W]: where the mask's colour lies on a segment picture. Surfaces look like it in a few glints at most."""
    red, green, blue = (picture[..., i] for i in range(3))
    return (red > 185) & (blue > 185) & (green < 100)


def read_boxes(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the frames in a detect picture, frames included, the largest first."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(read_mask(picture).astype(np.uint8), connectivity=8)
    found = [stats[i] for i in range(1, count) if stats[i][2] > 4 and stats[i][3] > 4]
    boxes = [(int(x), int(y), int(x + w - 1), int(y + h - 1)) for x, y, w, h, _ in found]
    return sorted(boxes, key=lambda box: -(box[2] - box[0]) * (box[3] - box[1]))


def frame_px(size_px: int) -> int:
    """Thickness of a frame and of limbs, pixels."""
    return max(round(size_px / 64), 1)


def _canny(rendered: Rendered) -> np.ndarray:
    return _white(cv2.Canny(cv2.cvtColor(rendered.image, cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS))


def _depth(rendered: Rendered) -> np.ndarray:
    share = (1 / rendered.depth - 1 / FAR) / (1 / NEAR - 1 / FAR)
    return _white(np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8))


def _hed(rendered: Rendered) -> np.ndarray:
    size = len(rendered.ids)
    edges = np.maximum(fine_contours(rendered.scene, size, thick=True), 0.6 * contours.colour_edges(rendered.image))
    soft = cv2.GaussianBlur(edges, (0, 0), 0.8 * size / 128)
    return _white((np.clip(1.35 * soft, 0, 1) * 255 + 0.5).astype(np.uint8))


def _mlsd(rendered: Rendered) -> np.ndarray:
    canvas = np.zeros(rendered.ids.shape, np.uint8)
    thickness = max(round(len(canvas) / 128), 1)
    for a, b in visible_lines(rendered):
        cv2.line(canvas, _fixed(a), _fixed(b), 255, thickness, cv2.LINE_AA, SUBPIXEL)
    return _white(canvas)


def _normal(rendered: Rendered) -> np.ndarray:
    shown = rendered.normal * np.float32((1, -1, -1))  # red to the right, green up, blue towards the viewer
    return np.floor((shown + 1) * 127.5 + 0.5).astype(np.uint8)


def _pose(rendered: Rendered) -> np.ndarray:
    if not rendered.joints:
        raise ValueError("task=pose: the scene has no doll")
    canvas = np.zeros((*rendered.ids.shape, 3), np.uint8)
    width = frame_px(len(canvas))
    far_first = sorted(rendered.joints.values(), key=lambda joints: -joints[:, 2].mean())
    for joints in far_first:
        for (a, b), colour in zip(LIMBS, POSE_COLOURS):
            darker = tuple(int(0.7 * v) for v in colour)
            cv2.line(canvas, _fixed(joints[a]), _fixed(joints[b]), darker, width, cv2.LINE_AA, SUBPIXEL)
        for joint, colour in zip(joints, POSE_COLOURS[: len(doll.JOINT_NAMES)]):
            radius = round(0.75 * width * 2**SUBPIXEL)
            cv2.circle(canvas, _fixed(joint), radius, colour, -1, cv2.LINE_AA, SUBPIXEL)
    return canvas


def _sketch(rendered: Rendered) -> np.ndarray:
    size = len(rendered.ids)
    lines = np.clip(1.5 * fine_contours(rendered.scene, size, thick=False), 0, 1)
    patterns = 0.55 * contours.colour_edges(rendered.image) * (rendered.ids > 0)
    return _white((255 - 225 * np.maximum(lines, patterns) + 0.5).astype(np.uint8))


def _segment(rendered: Rendered, target: Sequence[int]) -> np.ndarray:
    mask = mask_of(rendered, target)[..., None]
    laid = (1 - MASK_SHARE) * rendered.image + MASK_SHARE * np.float32(MASK_COLOUR)
    return np.where(mask, np.floor(laid + 0.5), rendered.image).astype(np.uint8)


def _detect(rendered: Rendered, target: Sequence[int]) -> np.ndarray:
    canvas, width = rendered.image.copy(), frame_px(len(rendered.image))
    for box in (box_of(rendered, i) for i in target):
        if box is not None:
            left, top, right, bottom = box[0] - width, box[1] - width, box[2] + width, box[3] + width
            frame = np.zeros(canvas.shape[:2], bool)
            frame[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
            frame[max(box[1], width) : min(box[3] + 1, len(frame) - width),
                  max(box[0], width) : min(box[2] + 1, len(frame) - width)] = False  # fmt: skip
            canvas[frame] = MASK_COLOUR
    return canvas


def _fixed(point) -> tuple[int, int]:
    """Pixels to OpenCV's fixed-point coordinates, in which the first pixel's centre is at 0."""
    return tuple(int(round((float(v) - 0.5) * 2**SUBPIXEL)) for v in point[:2])


def _white(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


_DRAWN = {
    "canny": _canny,
    "depth": _depth,
    "hed": _hed,
    "mlsd": _mlsd,
    "normal": _normal,
    "pose": _pose,
    "sketch": _sketch,
    "segment": _segment,
    "detect": _detect,
}
