"""Targets at the size of their bucket, and references beside them for the region mask.

Source: UniWorld-V1, training transform of the targets: bicubic with antialiasing, on floats.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from uniworld.config import DataConfig
from uniworld.models.image_size import output_size

MAX_FLOAT_PX = 1 << 24  # above, a picture is shrunk by whole numbers before it becomes floats
Box = tuple[float, float, float, float]  # left, upper, right, lower, as shares of the sides
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def bucket_of(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """(height, width) at which a target of this size is trained on, in pixels."""
    return output_size(height, width, config.anchor_px, num_ratios=config.num_ratios)


def centre_box(height: int, width: int, bucket: tuple[int, int]) -> Box:
    """The largest part around the centre with the bucket's ratio."""
    across = min(1.0, (height / width) * (bucket[1] / bucket[0]))
    down = min(1.0, (width / height) * (bucket[0] / bucket[1]))
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def cropped(image: Image.Image, box: Box) -> Image.Image:
    """The part `box` of a picture, at whole pixels and at least one."""
    if box == WHOLE:
        return image
    edges = [round(share * side) for share, side in zip(box, (image.width, image.height) * 2)]
    left, upper = min(edges[0], image.width - 1), min(edges[1], image.height - 1)
    return image.crop((left, upper, max(edges[2], left + 1), max(edges[3], upper + 1)))


def target_tensor(image: Image.Image, bucket: tuple[int, int]) -> Tensor:
    """An RGB picture stretched to (height, width) `bucket`: [3, H, W] fp32, in [-1, 1] up to bicubic's overshoot."""
    shrink = min(image.height // bucket[0], image.width // bucket[1]) // 2
    if image.height * image.width > MAX_FLOAT_PX and shrink > 1:
        image = image.reduce(shrink)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    if pixels.shape[1:] != bucket:
        pixels = interpolate(pixels[None], size=bucket, mode="bicubic", antialias=True, align_corners=False)[0]
    return pixels * 2 - 1


def stretched(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    """The picture at (height, width) `bucket` in 8 bits, as the region mask compares it."""
    size = (bucket[1], bucket[0])
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
