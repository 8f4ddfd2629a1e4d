"""Pictures as the VLM takes them: resized to a pixel budget, normalized, cut into patches. No torchvision needed.

Letters: P patches of an image, C colours, T temporal patch size, p patch side in pixels, m merge side in patches.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

AREA_PX = 448 * 448
INFERENCE_FACTOR = 28
TRAINING_FACTOR = 56
MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size (height, width) that Qwen's rule gives: multiples of `factor`, area within the bounds, ratio kept.

    With min_pixels = max_pixels the area is rounded down from above and up from below, so the bound is approximate.

    Raises:
        ValueError: one side is over 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"image: {width}x{height} px, sides may differ at most by a factor of {MAX_ASPECT_RATIO}")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def normalized(image: Image.Image, rescale_factor: float, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture as [C, height, width] fp32, (pixel * rescale_factor - mean) / std per colour."""
    levels = _normalized_levels(rescale_factor, tuple(mean), tuple(std))
    pixels = np.asarray(image.convert("RGB"))
    found = np.empty((len(levels), *pixels.shape[:2]), dtype=np.float32)
    for colour, of_levels in enumerate(levels):
        np.take(of_levels, pixels[..., colour], out=found[colour], mode="clip")  # a level is never past the end
    return torch.from_numpy(found)


@functools.lru_cache(maxsize=8)
def _normalized_levels(rescale_factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[C, 256] fp32: what each level of a colour becomes. To look them up takes less time than the sums."""
    levels = np.arange(256, dtype=np.float32)[:, None] * np.float32(rescale_factor)
    return ((levels - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)).T.copy()


class VisionProcessor:
    """Makes the VLM's `pixel_values` and `image_grid_thw` from pictures.

    Args:
        config: the checkpoint's preprocessor_config.json.
        min_pixels, max_pixels: bounds of a picture's area after resizing; equal by default, as the model was trained.
            `max_pixels` of the config lowers both: a small model sees small pictures.
        factor: both sides become multiples of this many pixels: 28 at inference, 56 in training.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        min_pixels: int = AREA_PX,
        max_pixels: int = AREA_PX,
        factor: int = INFERENCE_FACTOR,
    ):
        self.config = config
        self.patch_size: int = config["patch_size"]
        self.temporal_patch_size: int = config["temporal_patch_size"]
        self.merge_size: int = config["merge_size"]
        if factor % (self.patch_size * self.merge_size):
            raise ValueError(f"factor={factor}: must be a multiple of {self.patch_size * self.merge_size}")
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"min_pixels={min_pixels}: must be from 1 to max_pixels={max_pixels}")
        ceiling: int = config.get("max_pixels") or max_pixels
        self.min_pixels, self.max_pixels, self.factor = min(min_pixels, ceiling), min(max_pixels, ceiling), factor

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """pixel_values [sum of P, C T p p] fp32 and image_grid_thw [num_images, 3] int64, grids in patches."""
        patches, grids = zip(*(self._encode(image) for image in images))
        return torch.cat(patches), torch.tensor(grids, dtype=torch.int64)

    def resized(self, image: Image.Image) -> Image.Image:
        rows, columns = smart_resize(image.height, image.width, self.factor, self.min_pixels, self.max_pixels)
        resample = Image.Resampling(self.config.get("resample", Image.Resampling.BICUBIC))
        return image.convert("RGB").resize((columns, rows), resample)

    def _encode(self, image: Image.Image) -> tuple[Tensor, tuple[int, int, int]]:
        config, p, m = self.config, self.patch_size, self.merge_size
        pixels = normalized(self.resized(image), config["rescale_factor"], config["image_mean"], config["image_std"])
        C, height, width = pixels.shape
        rows, columns = height // p, width // p
        # patches that are merged into one token stand side by side: (row block, column block, row in it, column in it)
        patches = pixels.view(C, rows // m, m, p, columns // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        patches = patches.unsqueeze(5).expand(-1, -1, -1, -1, -1, self.temporal_patch_size, -1, -1)
        return patches.reshape(rows * columns, -1), (1, rows, columns)
