"""The fixed pinhole camera: 22 degrees down onto the floor, square pictures.

World units: X right, Y up, Z away from the camera. Camera space: x right, y down, z along the view, as in OpenCV.
"""

import math

import numpy as np

PITCH = math.radians(22.0)
TAN_HALF_FOV = 0.30
POSITION = (0.0, 3.9, -6.2)
RIGHT = (1.0, 0.0, 0.0)
UP = (0.0, math.cos(PITCH), math.sin(PITCH))
FORWARD = (0.0, -math.sin(PITCH), math.cos(PITCH))
WALL_Z = 4.6  # where the floor ends and the backdrop stands


def to_camera(points: np.ndarray) -> np.ndarray:
    """World points [..., 3] in camera space."""
    p = np.asarray(points, np.float64) - POSITION
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    return np.stack([x, -(y * UP[1] + z * UP[2]), y * FORWARD[1] + z * FORWARD[2]], -1)


def project(points: np.ndarray, size_px: int) -> np.ndarray:
    """World points [..., 3] to pixels [..., 2] (x right, y down; the first pixel's centre is at 0.5, 0.5)."""
    p = to_camera(points)
    half = size_px / 2
    return half + half / TAN_HALF_FOV * p[..., :2] / p[..., 2:]


def visible_half_width(z: float) -> float:
    """World units from the middle to the edge of the picture, on the floor at world depth z."""
    return TAN_HALF_FOV * ((z - POSITION[2]) * FORWARD[2] - POSITION[1] * FORWARD[1])


def sphere_bounds(centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """The smallest rectangles around the pictures of spheres, centres [N, 3] and radii [N].

    Returns:
        float64 [N, 4]: left, right, top, bottom, from -1 to 1 across the picture.
    """
    p = to_camera(centres)
    along, z, r = p[:, :2], p[:, 2:], radii[:, None]
    tangent = np.sqrt(along * along + z * z - r * r)  # to the points where lines from the camera touch
    low = (along * tangent - z * r) / (z * tangent + along * r) / TAN_HALF_FOV
    high = (along * tangent + z * r) / (z * tangent - along * r) / TAN_HALF_FOV
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
