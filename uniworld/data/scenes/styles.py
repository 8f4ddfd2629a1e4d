"""Styles of the whole picture. Each is a fixed filter of local reach, so that what an edit leaves alone stays alike."""

from functools import lru_cache

import cv2
import numpy as np

from uniworld.data.scenes.graph import STYLES, check_choice

NEED_LINES = ("pencil sketch", "watercolour", "cartoon")


def apply(style: str, image: np.ndarray, lines: np.ndarray | None = None) -> np.ndarray:
    """A photo, uint8 [H, W, 3], in another style.

    Args:
        lines: contours of the things, float32 [H, W] from 0 to 1, for the styles of NEED_LINES.
    """
    check_choice("style", style, STYLES)
    if style == "photo":
        return image
    drawn = _FILTERS[style](image, lines) if style in NEED_LINES else _FILTERS[style](image)
    return np.clip(drawn + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _paper(size_px: int) -> np.ndarray:
    """The grain of paper, float32 [H, W] about 0, from -1 to 1."""
    noise = np.random.default_rng(7).random((size_px, size_px), dtype=np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 0.8 * size_px / 128)
    return (smooth - smooth.mean()) / np.abs(smooth - smooth.mean()).max()


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _pencil_sketch(image: np.ndarray, lines: np.ndarray) -> np.ndarray:
    size = len(image)
    grey = cv2.GaussianBlur(_grey(image), (0, 0), 0.6 * size / 128)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (128 / size)
    shade = np.clip((205 - grey) / 190, 0, 1)
    # Strokes: one set of slanted lines for half tones, a second across them for dark ones.
    strokes = [np.clip(1.2 - np.abs((slant / 3.2) % 1.0 - 0.5) * 4, 0, 1) for slant in (x + y, x - y)]
    hatch = strokes[0] * np.clip(shade * 1.5, 0, 1) + strokes[1] * np.clip(shade * 2 - 0.9, 0, 1)
    tone = 246 - 62 * shade - 62 * hatch + 7 * _paper(size)
    return np.repeat((tone * (1 - 0.75 * lines))[..., None], 3, 2)


def _watercolour(image: np.ndarray, lines: np.ndarray) -> np.ndarray:
    size = len(image)
    wash = cv2.bilateralFilter(image, 7, 40, 2.5 * size / 128).astype(np.float32)
    wash = cv2.GaussianBlur(wash, (0, 0), 0.5 * size / 128)
    light = 255 - (255 - wash) * 0.78  # thin paint lets the paper through
    pool = cv2.GaussianBlur(lines, (0, 0), 0.8 * size / 128)  # paint gathers at the edges of a patch
    blot = 1 + 0.45 * cv2.GaussianBlur(_paper(size), (0, 0), 3.5 * size / 128) + 0.09 * _paper(size)
    return 255 - (255 - light) * (blot * (1 + 0.55 * pool))[..., None]


def _pixel_art(image: np.ndarray) -> np.ndarray:
    size = len(image)
    block = max(size // 32, 1)
    small = cv2.resize(image, (size // block, size // block), interpolation=cv2.INTER_AREA)
    tones = cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb).astype(np.float32)
    tones[..., 0] = np.round(tones[..., 0] / 28) * 28  # few tones, and chroma in steps about grey
    tones[..., 1:] = np.round((tones[..., 1:] - 128) / 14) * 14 + 128
    few = cv2.cvtColor(np.clip(tones, 0, 255).astype(np.uint8), cv2.COLOR_YCrCb2RGB).astype(np.float32)
    big = cv2.resize(few, (size // block * block,) * 2, interpolation=cv2.INTER_NEAREST)
    edge = size - len(big)
    return np.pad(big, ((0, edge), (0, edge), (0, 0)), "edge")


def _black_and_white(image: np.ndarray) -> np.ndarray:
    grey = _grey(image) / 255
    contrast = grey * grey * (3 - 2 * grey)
    return np.repeat((255 * (0.45 * grey + 0.55 * contrast))[..., None], 3, 2)


def _cartoon(image: np.ndarray, lines: np.ndarray) -> np.ndarray:
    size = len(image)
    flat = cv2.bilateralFilter(image, 7, 50, 2.5 * size / 128)
    hsv = cv2.cvtColor(flat.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    bands = 5 * hsv[..., 2]
    whole = np.floor(bands)
    hsv[..., 2] = (whole + np.clip((bands - whole - 0.42) / 0.16, 0, 1)) / 5  # steps of brightness with soft edges
    hsv[..., 1] = np.clip(hsv[..., 1] * 1.25, 0, 1)
    bright = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255
    ink = np.clip(1.3 * cv2.GaussianBlur(lines, (0, 0), 0.45 * size / 128), 0, 1)
    return bright * (1 - 0.88 * ink)[..., None]


def _oil_painting(image: np.ndarray) -> np.ndarray:
    """Kuwahara's filter: every pixel takes the mean of the calmest of the four squares that touch it."""
    size = len(image)
    reach = max(round(2.5 * size / 128), 1)
    grain = 9 * _strokes(size)[..., None]
    colour = np.clip(image.astype(np.float32) + grain, 0, 255)
    grey = colour.mean(-1)
    side = reach + 1
    mean, mean_grey, square = (cv2.blur(x, (side, side)) for x in (colour, grey, grey * grey))
    spread = square - mean_grey * mean_grey
    half = side // 2
    best, result = np.full(grey.shape, np.inf, np.float32), np.zeros_like(colour)
    for dy in (-half, half):
        for dx in (-half, half):
            move = np.float32([[1, 0, -dx], [0, 1, -dy]])
            moved = [cv2.warpAffine(x, move, (size, size), borderMode=cv2.BORDER_REPLICATE) for x in (spread, mean)]
            calmer = moved[0] < best
            best, result = np.where(calmer, moved[0], best), np.where(calmer[..., None], moved[1], result)
    middle = cv2.GaussianBlur(result, (0, 0), 3.0 * size / 128)
    return middle + 1.15 * (result - middle) + 0.6 * grain


@lru_cache(maxsize=8)
def _strokes(size_px: int) -> np.ndarray:
    """Noise smeared along slanted strokes, float32 [H, W] about 0, from -1 to 1."""
    noise = np.random.default_rng(11).random((size_px, size_px), dtype=np.float32) - 0.5
    length = 2 * round(3 * size_px / 128) + 1
    kernel = np.fliplr(np.eye(length, dtype=np.float32)) / length
    smear = cv2.GaussianBlur(cv2.filter2D(noise, -1, kernel), (0, 0), 0.5 * size_px / 128)
    return smear / np.abs(smear).max()


_FILTERS = {
    "pencil sketch": _pencil_sketch,
    "watercolour": _watercolour,
    "pixel art": _pixel_art,
    "black and white": _black_and_white,
    "cartoon": _cartoon,
    "oil painting": _oil_painting,
}
