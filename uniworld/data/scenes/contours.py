"""Contours of things from their geometry: outlines, creases between faces, and edges where one part hides another."""

import cv2
import numpy as np

CREASE = 0.02, 0.20  # 1 - cosine between neighbouring normals where a crease begins, and how much more is a full one
DEPTH_STEP = 0.10  # world units beyond what the surface's slope explains
BACKGROUND_SHARE = 0.6  # how strongly the line between floor and wall counts


def contours(ids: np.ndarray, depth: np.ndarray, normal: np.ndarray, seam: bool, thick: bool) -> np.ndarray:
    """How much of an edge each pixel is, float32 [H, W] from 0 to 1.

    Args:
        ids, depth, normal: as in `Rendered`.
        seam: whether the line between floor and wall is seen.
        thick: mark the pixels on both sides of an edge; else the nearer side only.
    """
    edges = np.zeros(ids.shape, np.float32)
    if seam:
        on_floor = (ids == 0) & (normal[..., 2] > -0.7)  # the wall faces the viewer more squarely than the floor
        foot = (ids[:-1] == 0) & on_floor[1:] & ~on_floor[:-1]
        edges[1:] = BACKGROUND_SHARE * foot
        edges[:-1] = np.maximum(edges[:-1], BACKGROUND_SHARE * foot * thick)
    shown = np.nonzero(ids.any(1))[0], np.nonzero(ids.any(0))[0]
    if len(shown[0]):
        window = tuple(slice(max(found[0] - 2, 0), found[-1] + 3) for found in shown)
        edges[window] = np.maximum(edges[window], _edges_of_things(ids[window], depth[window], normal[window], thick))
    return edges


def _edges_of_things(ids: np.ndarray, depth: np.ndarray, normal: np.ndarray, thick: bool) -> np.ndarray:
    edges = np.zeros(ids.shape, np.float32)
    for axis in (0, 1):
        a, b = (_side(axis, slice(None, -1)), _side(axis, slice(1, None)))
        across = normal[a] * normal[b]
        crease = np.clip((1 - CREASE[0] - across[..., 0] - across[..., 1] - across[..., 2]) / CREASE[1], 0, 1)
        whole = (ids[a] != ids[b]) | _jumps(depth, axis, a, b)
        strength = np.where(whole, np.float32(1), crease) * ((ids[a] > 0) | (ids[b] > 0))
        nearer = depth[a] <= depth[b]
        edges[a] = np.maximum(edges[a], strength * (thick | nearer))
        edges[b] = np.maximum(edges[b], strength * (thick | ~nearer))
    return edges


def _side(axis: int, part: slice) -> tuple[slice, slice]:
    return (part, slice(None)) if axis == 0 else (slice(None), part)


def _jumps(depth: np.ndarray, axis: int, a, b) -> np.ndarray:
    """Whether depth steps from pixel a to b by more than the slopes on both sides explain."""
    step = np.abs(depth[b] - depth[a])
    explained = np.minimum(np.roll(step, 1, axis), np.roll(step, -1, axis))
    return step - explained > DEPTH_STEP


def halve(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels."""
    return 0.25 * (image[0::2, 0::2] + image[0::2, 1::2] + image[1::2, 0::2] + image[1::2, 1::2])


def colour_edges(image: np.ndarray) -> np.ndarray:
    """How sharply the colour of uint8 [H, W, 3] changes: float32 [H, W] from 0 to 1."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    change = [cv2.Scharr(lab, cv2.CV_32F, *way) for way in ((1, 0), (0, 1))]
    size = np.sqrt((change[0] ** 2 + change[1] ** 2).sum(-1)) / 32  # Lab units across two pixels
    return np.clip((size - 14) / 40, 0, 1)
