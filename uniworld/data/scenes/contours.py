"""Contours of things from their geometry: outlines, creases between faces, and edges where one part hides another."""

import cv2
import numpy as np

CREASE = (0.02, 0.22)  # 1 - cosine between neighbouring normals: no crease, a full one
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
    for axis in (0, 1):
        a, b = (_side(axis, slice(None, -1)), _side(axis, slice(1, None)))
        differ = ids[a] != ids[b]
        turned = 1 - np.einsum("hwc,hwc->hw", normal[a], normal[b])
        crease = np.clip((turned - CREASE[0]) / (CREASE[1] - CREASE[0]), 0, 1)
        both_behind = (ids[a] == 0) & (ids[b] == 0)
        crease = np.where(both_behind, BACKGROUND_SHARE * seam * (crease > 0.5), crease)
        strength = np.where(differ | _jumps(depth, axis, a, b, both_behind), 1.0, crease).astype(np.float32)
        nearer = depth[a] <= depth[b]
        edges[a] = np.maximum(edges[a], np.where(thick | nearer, strength, 0))
        edges[b] = np.maximum(edges[b], np.where(thick | ~nearer, strength, 0))
    return edges


def _side(axis: int, part: slice) -> tuple[slice, slice]:
    return (part, slice(None)) if axis == 0 else (slice(None), part)


def _jumps(depth: np.ndarray, axis: int, a, b, both_behind: np.ndarray) -> np.ndarray:
    """Whether depth steps from pixel a to b by more than the slopes on both sides explain."""
    step = depth[b] - depth[a]
    before, after = np.roll(step, 1, axis), np.roll(step, -1, axis)
    explained = np.maximum(np.minimum(np.abs(before), np.abs(after)), 0)
    return (np.abs(step) - explained > DEPTH_STEP) & ~both_behind


def halve(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels."""
    return 0.25 * (image[0::2, 0::2] + image[0::2, 1::2] + image[1::2, 0::2] + image[1::2, 1::2])


def colour_edges(image: np.ndarray) -> np.ndarray:
    """How sharply the colour of uint8 [H, W, 3] changes: float32 [H, W] from 0 to 1."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    change = [cv2.Scharr(lab, cv2.CV_32F, *way) for way in ((1, 0), (0, 1))]
    size = np.sqrt((change[0] ** 2 + change[1] ** 2).sum(-1)) / 32  # Lab units across two pixels
    return np.clip((size - 14) / 40, 0, 1)
