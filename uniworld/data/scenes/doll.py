"""The doll: a jointed mannequin of ellipsoids that stands on the floor. Its joints are what pose targets show.

All lengths are multiples of the doll's radius. Local axes: x to the viewer's right when it faces the camera (the
doll's own left), y up, z away from the viewer.
"""

import math
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes.graph import ARM, LEG, POSES

# OpenPose's body joints, in its order (without eyes and ears, which a doll does not have).
JOINT_NAMES = (
    "nose",
    "neck",
    "right shoulder",
    "right elbow",
    "right wrist",
    "left shoulder",
    "left elbow",
    "left wrist",
    "right hip",
    "right knee",
    "right ankle",
    "left hip",
    "left knee",
    "left ankle",
)
JOINT_TONE = 0.62  # joints are darker than the limbs
SHOULDER_Y, HEAD_RADII = 0.98, (0.32, 0.38, 0.34)  # above the hips


@dataclass(frozen=True)
class Part:
    """An ellipsoid: centre [3], radii [3], rows of `axes` [3, 3] its own axes, `tone` the brightness of its colour."""

    centre: np.ndarray
    radii: tuple[float, float, float]
    axes: np.ndarray
    tone: float = 1.0


def build(pose: tuple[float, ...]) -> tuple[list[Part], np.ndarray]:
    """The parts of a doll of radius 1 at the origin, and its joints [14, 3] in the order of JOINT_NAMES."""
    angles = [math.radians(angle) for angle in pose or POSES["standing"]]
    parts, joints = [], {}
    for side, name, first in ((1.0, "left", 0), (-1.0, "right", 2)):
        arm = _limb(side, angles[first], angles[first + 1], ARM, SHOULDER_Y)
        leg = _limb(side, angles[first + 4], angles[first + 5], LEG, 0.0)
        parts += _limb_parts(arm, widths=(0.145, 0.125), end=(0.115, 0.16, 0.10), forward=0.0)
        parts += _limb_parts(leg, widths=(0.19, 0.155), end=(0.15, 0.11, 0.24), forward=-0.1)
        for joint, point in zip(("shoulder", "elbow", "wrist"), arm):
            joints[f"{name} {joint}"] = point
        for joint, point in zip(("hip", "knee", "ankle"), leg):
            joints[f"{name} {joint}"] = point
    parts += _trunk()
    joints["neck"] = np.array([0.0, SHOULDER_Y + 0.08, 0.0])
    joints["nose"] = np.array([0.0, SHOULDER_Y + 0.56, -HEAD_RADII[2]])
    lift = -min(_lowest(part) for part in parts)
    up = np.array([0.0, lift, 0.0])
    lifted = [Part(part.centre + up, part.radii, part.axes, part.tone) for part in parts]
    return lifted, np.array([joints[name] for name in JOINT_NAMES]) + up


def _limb(side: float, first: float, second: float, lengths: tuple[float, ...], start_y: float) -> list[np.ndarray]:
    """Its points: shoulder, elbow, wrist, hand (or hip, knee, ankle, foot)."""
    start, upper, lower, end = lengths
    points = [np.array([side * start, start_y, 0.0])]
    for angle, length in ((first, upper), (first + second, lower), (first + second, end)):
        bone = np.array([side * math.sin(angle), -math.cos(angle), 0.0])
        points.append(points[-1] + length * bone)
    return points


def _limb_parts(points: list[np.ndarray], widths, end, forward: float) -> list[Part]:
    start, middle, last, tip = points
    parts = [_ball(start, widths[0] * 1.12), _ball(middle, widths[1] * 1.12)]
    for a, b, width in ((start, middle, widths[0]), (middle, last, widths[1])):
        length = float(np.linalg.norm(b - a))
        parts.append(Part((a + b) / 2, (width, length / 2 + 0.04, width), _frame(b - a)))
    frame = _frame(tip - last)
    return [*parts, Part((last + tip) / 2 + forward * frame[2], end, frame)]


def _trunk() -> list[Part]:
    upright = np.eye(3)
    return [
        Part(np.array([0.0, 0.04, 0.0]), (0.38, 0.25, 0.25), upright),
        _ball(np.array([0.0, 0.29, 0.0]), 0.2),
        Part(np.array([0.0, 0.69, 0.0]), (0.44, 0.45, 0.28), upright),
        _ball(np.array([0.0, SHOULDER_Y + 0.18, 0.0]), 0.14),
        Part(np.array([0.0, SHOULDER_Y + 0.60, 0.0]), HEAD_RADII, upright),
    ]


def _ball(centre: np.ndarray, radius: float) -> Part:
    return Part(centre, (radius, radius, radius), np.eye(3), JOINT_TONE)


def _frame(bone: np.ndarray) -> np.ndarray:
    """Axes whose y runs against the bone and whose z stays the doll's."""
    y = -bone / np.linalg.norm(bone)
    z = np.array([0.0, 0.0, 1.0])
    return np.array([np.cross(y, z), y, z])


def _lowest(part: Part) -> float:
    extent = np.sqrt(np.sum((part.axes[:, 1] * part.radii) ** 2))
    return float(part.centre[1] - extent)
