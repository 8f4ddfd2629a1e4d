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
TO_CAMERA = np.array([RIGHT, [-u for u in UP], FORWARD])  # rows: camera axes in the world


def to_camera(points: np.ndarray) -> np.ndarray:
    """World points [..., 3] in camera space."""
    return (np.asarray(points, np.float64) - POSITION) @ TO_CAMERA.T


def project(points: np.ndarray, size_px: int) -> np.ndarray:
    """World points [..., 3] to pixels [..., 2] (x right, y down; the first pixel's centre is at 0.5, 0.5)."""
    p = to_camera(points)
    half = size_px / 2
    return half + half / TAN_HALF_FOV * p[..., :2] / p[..., 2:]


def visible_half_width(z: float) -> float:
    """World units from the middle to the edge of the picture, on the floor at world depth z."""
    return TAN_HALF_FOV * float(to_camera(np.array([0.0, 0.0, z]))[2])


def sphere_bounds(centre: np.ndarray, radius: float) -> tuple[float, float, float, float]:
    """The smallest rectangle around a sphere's picture: left, right, top, bottom, from -1 to 1 across the picture."""
    x, y, z = to_camera(centre)
    bounds = []
    for along in (x, y):
        # Tangent lines from the camera in the plane of this axis and the view.
        tangent = math.sqrt(max(along * along + z * z - radius * radius, 1e-12))
        bounds += [
            (along * tangent - z * radius) / (z * tangent + along * radius) / TAN_HALF_FOV,
            (along * tangent + z * radius) / (z * tangent - along * radius) / TAN_HALF_FOV,
        ]
    return tuple(bounds)
