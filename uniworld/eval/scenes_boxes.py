"""Frames found in a mask, also where they cross or touch."""

import numpy as np

SIDE_FILLED = 0.8  # of each side of a frame
FEWEST_NEW = 0.3  # of a frame's pixels, that no frame found before has
SMALLEST_PX = 5
MAX_BOXES = 8
MOST_LINES = 24  # that sides are chosen from, each way


def read_boxes(mask: np.ndarray, width: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom pixel of the frames in a bool [H, W] mask, whose lines are `width` pixels wide."""
    left_over, boxes = mask.copy(), []
    rectangles = _rectangles(mask, width)
    while len(boxes) < MAX_BOXES and rectangles:
        new = [int(left_over[frame(box, width, mask.shape)].sum()) for box in rectangles]
        best = int(np.argmax(new))
        if new[best] < FEWEST_NEW * frame(rectangles[best], width, mask.shape).sum():
            break
        box = rectangles.pop(best)
        boxes.append(box)
        left, top, right, bottom = box
        near = frame((left - 1, top - 1, right + 1, bottom + 1), width + 2, mask.shape)
        left_over &= ~near
    return boxes


def frame(box: tuple[int, int, int, int], width: int, shape: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels of a frame."""
    left, top, right, bottom = box
    there = np.zeros(shape, bool)
    there[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
    there[max(top + width, 0) : max(bottom + 1 - width, 0), max(left + width, 0) : max(right + 1 - width, 0)] = False
    return there


def _rectangles(mask: np.ndarray, width: int) -> list[tuple[int, int, int, int]]:
    """All rectangles whose four sides are filled; of many that are nearly the same, the best filled."""
    rows, columns = _lines(mask, width), _lines(mask.T, width)
    filled_x, filled_y = (np.pad(_thick(m, width), ((0, 0), (1, 0))).cumsum(1) for m in (mask, mask.T))
    found = []
    for i, top in enumerate(rows):
        for bottom in [b for b in rows[i:] if b - top >= SMALLEST_PX]:
            for j, left in enumerate(columns):
                for right in [r for r in columns[j:] if r - left >= SMALLEST_PX]:
                    across, down = right - left + width, bottom - top + width
                    sides = (
                        (filled_x[top, right + width] - filled_x[top, left]) / across,
                        (filled_x[bottom, right + width] - filled_x[bottom, left]) / across,
                        (filled_y[left, bottom + width] - filled_y[left, top]) / down,
                        (filled_y[right, bottom + width] - filled_y[right, top]) / down,
                    )
                    if min(sides) >= SIDE_FILLED:
                        found.append((sum(sides), (left, top, right + width - 1, bottom + width - 1)))
    found.sort(key=lambda pair: -pair[0])
    kept: list[tuple[int, int, int, int]] = []
    for _, box in found:
        if all(max(abs(a - b) for a, b in zip(box, other)) > width for other in kept):
            kept.append(box)
    return kept


def _thick(mask: np.ndarray, width: int) -> np.ndarray:
    """float64 [H - width + 1, W]: 1 where the mask is set in most of `width` rows from here."""
    rows = len(mask) - width + 1
    return (sum(mask[i : i + rows].astype(np.float64) for i in range(width)) >= 0.75 * width).astype(np.float64)


def _lines(mask: np.ndarray, width: int) -> list[int]:
    """Rows from which a horizontal line may run, the longest, in order."""
    thick = _thick(mask, width)
    runs = np.zeros(len(thick))
    length = np.zeros(len(thick))
    for column in thick.T:
        length = (length + 1) * column
        runs = np.maximum(runs, length)
    best = np.argsort(-runs, kind="stable")[:MOST_LINES]
    return sorted(int(row) for row in best if runs[row] >= SMALLEST_PX)
