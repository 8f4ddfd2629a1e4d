"""Pictures compared: colour differences as the eye weighs them, and PSNR."""

import cv2
import numpy as np

MOST = 30.0  # of a colour difference, CIELAB units: that wrong is wrong
BACKDROP_SEEDS = range(4)  # whose textures a backdrop is looked for with: two of training, both held-out ones
SOFTNESS_PX = 1.0  # standard deviation of the blur before comparing, at 128 pixels


def fitted(picture: np.ndarray, size_px: int) -> np.ndarray:
    """uint8 [size_px, size_px, 3] of a picture of any size."""
    if picture.shape[:2] == (size_px, size_px):
        return picture
    smaller = picture.shape[0] > size_px
    return cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def lab(picture: np.ndarray) -> np.ndarray:
    """A slightly blurred picture in CIELAB, float32 [H, W, 3]: fine texture and noise do not count."""
    soft = cv2.GaussianBlur(picture.astype(np.float32) / 255, (0, 0), SOFTNESS_PX * len(picture) / 128)
    return cv2.cvtColor(soft, cv2.COLOR_RGB2LAB)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of two pictures in CIELAB at every pixel, at most MOST: float32 [H, W]."""
    d = a - b
    return np.minimum(np.sqrt(np.einsum("...i,...i", d, d)), MOST)


def psnr(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures over the pixels of a mask; 99 where they are equal."""
    error = np.square(a[where].astype(np.float64) - b[where]).mean()
    return float(min(10 * np.log10(255**2 / error), 99.0)) if error else 99.0
