"""Region masks and loss weights: where a (references, target) pair was edited, and how much those latents count.

Source: UniWorld-V1, section "Region weighting". H, W: image height and width in pixels; a latent pixel is 8x8 pixels.
The C++ pipeline of `csrc/region_mask.cpp` serves where it was built; `region_mask_reference` gives the same bits.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageChops

from uniworld.data.buckets import Box
from uniworld.kernels import extension, registry

THRESHOLD = 18  # grey levels of difference from which a pixel counts as changed
MIN_COMPONENT_SHARE = (3, 10)  # of the changed area, below which a component is dropped, as a fraction
MIN_EDITED_SHARE = 0.001  # of the image, below which a pair is refused
LATENT_PX = 8
ELLIPSE_5X5 = np.array([[0, 0, 1, 0, 0], [1] * 5, [1] * 5, [1] * 5, [0, 0, 1, 0, 0]], np.uint8)

RgbImage = Image.Image | np.ndarray

# x = total area / edited area. The authors' figures come from fp32 tensors; these keep their last bits.
WEIGHTS: dict[str, Callable[[float], np.float32]] = {
    "linear": lambda x: np.float32(x),
    "exp": lambda x: np.float32(2.0 ** float(np.float32(math.sqrt(x)) - 1)),
    "log": lambda x: np.float32(math.log2(x)) + 1,
    "sqrt": lambda x: (np.float32(math.sqrt(x)) - 1) ** 2 + 1,
}


class EditTooSmallError(ValueError):
    """The pair differs, but in too few pixels to learn from; `share` is the edited share of the image."""

    def __init__(self, share: float):
        super().__init__(f"edited share={share}: must be 0 or at least {MIN_EDITED_SHARE} of the image")
        self.share = share


def region_mask(
    references: Sequence[RgbImage], target: RgbImage, *, need_weight: bool = True, keep_scattered: bool = False
) -> np.ndarray:
    """The latent pixels that differ from every reference.

    Args:
        references: RGB images (PIL, or uint8 arrays [H, W, 3]); one of another size is resized to the target's
            (bicubic). None at all is text to image.
        target: the edited RGB image, at least 8x8 pixels.
        need_weight: False gives a mask of ones without looking at the pictures.
        keep_scattered: where every component is under 30 % of the changed area, keep those of at least one latent
            pixel, in place of dropping them all and taking the pair for a reconstruction.

    Returns:
        uint8 [H // 8, W // 8], 255 where edited and 0 elsewhere. All 255 where nothing is edited (reconstruction),
        without references, and without `need_weight`.

    Raises:
        EditTooSmallError: (a ValueError) if under 0.1 % of the pixels are edited, but not none.
    """
    width, height = _size(target, "target")
    latent_hw = height // LATENT_PX, width // LATENT_PX
    if 0 in latent_hw:
        raise ValueError(f"target: is {width}x{height}, must be at least {LATENT_PX}x{LATENT_PX} pixels")
    if not references or not need_weight:
        return np.full(latent_hw, 255, np.uint8)
    references = [_resized(image, (width, height), f"references[{i}]") for i, image in enumerate(references)]
    pipeline = _pipeline_core if _uses_core() else region_mask_reference
    mask, num_edited = pipeline(references, target, keep_scattered)
    if num_edited == 0:
        return np.full(latent_hw, 255, np.uint8)
    share = num_edited / (height * width)
    if share < MIN_EDITED_SHARE:
        raise EditTooSmallError(share)
    return mask


def region_weight(mask: np.ndarray, kind: str = "log") -> np.ndarray:
    """The loss weight of each latent pixel: w(total area / edited area) where the mask is set, 1 elsewhere.

    Args:
        mask: [h, w], nonzero where edited; at least one pixel is.
        kind: "linear" x, "exp" 2^(sqrt(x) - 1), "log" log2(x) + 1, "sqrt" (sqrt(x) - 1)^2 + 1.

    Returns:
        float32 [h, w], rounded to six decimals.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(WEIGHTS)}")
    num_edited = np.count_nonzero(mask)
    if num_edited == 0:
        raise ValueError(f"mask: has no edited pixel among {mask.size}, must have at least one")
    edited_share = np.float32(num_edited / mask.size)
    weight = np.round(WEIGHTS[kind](1 / float(edited_share)), 6)
    return np.where(mask != 0, weight, np.float32(1))


def focus_weight(boxes: Sequence[Box], latent_hw: tuple[int, int], greatest: float) -> np.ndarray:
    """The loss weight of each latent pixel by what a sample says matters most in its target.

    Args:
        boxes: parts of the target; what lies outside of it is cut off.
        latent_hw: (h, w). greatest: the weight of a latent pixel that a box covers.

    Returns:
        float32 [h, w]: from 1, where no box is, to `greatest`, by how much of the latent pixel one box covers.
    """
    h, w = latent_hw
    covered = np.zeros(latent_hw, np.float32)
    for left, upper, right, lower in boxes:
        covered = np.maximum(covered, np.outer(_overlap(upper, lower, h), _overlap(left, right, w)))
    return (1 + (greatest - 1) * covered).astype(np.float32)


def _overlap(start: float, end: float, num_cells: int) -> np.ndarray:
    """[num_cells]: the share of each of equal cells from 0 to 1 that lies between start and end."""
    edges = np.arange(num_cells + 1) / num_cells
    return (np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)).clip(0) * num_cells


def region_mask_reference(
    references: Sequence[RgbImage], target: RgbImage, keep_scattered: bool = False
) -> tuple[np.ndarray, int]:
    """The pipeline step by step with Pillow and OpenCV, before the checks on the edited share.

    Args:
        references: at least one RGB image of the target's size.
        target: RGB image [H, W].

    Returns:
        The mask, uint8 [H // 8, W // 8] of 0 and 255, and the number of edited pixels (of H * W).
    """
    target = _as_pil(target)
    edited = np.logical_and.reduce([_changed_region(_as_pil(r), target, keep_scattered) for r in references])
    h, w = (n // LATENT_PX for n in edited.shape)
    cells = edited[: h * LATENT_PX, : w * LATENT_PX].reshape(h, LATENT_PX, w, LATENT_PX)
    pooled = cells.max(axis=(1, 3)).astype(np.uint8) * 255
    return cv2.morphologyEx(pooled, cv2.MORPH_CLOSE, ELLIPSE_5X5), int(edited.sum())


def _changed_region(reference: Image.Image, target: Image.Image, keep_scattered: bool) -> np.ndarray:
    """bool [H, W]: the large components of the pixels that differ."""
    grey = np.asarray(ImageChops.difference(reference, target).convert("L"))
    changed = (grey >= THRESHOLD).astype(np.uint8)
    changed = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, ELLIPSE_5X5)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(changed, connectivity=8)
    area = stats[:, cv2.CC_STAT_AREA].astype(np.int64)
    area[0] = 0  # label 0 is the background
    share, of = MIN_COMPONENT_SHARE
    keep = (area > 0) & (of * area >= share * area.sum())
    if keep_scattered and not keep.any():
        keep = area >= LATENT_PX**2
    return keep[labels]


def _uses_core() -> bool:
    """Pictures are no tensors and have no Triton kernel: C++ where built, unless plain torch is asked for."""
    forced = registry.forced_backend()
    if forced == "cpp" and not extension.has("region_mask"):
        raise RuntimeError(f"UNIWORLD_KERNELS=cpp: region_mask has no C++ version here. {extension.MISSING}")
    return forced != "torch" and extension.has("region_mask")


def _pipeline_core(
    references: Sequence[RgbImage], target: RgbImage, keep_scattered: bool
) -> tuple[np.ndarray, int]:
    """`region_mask_reference` in the C++ core."""
    width, height = _size(target, "target")
    images = [*references, target]
    views = [_shared_pixels(image) for image in images]
    pixel_bytes = 4
    if any(view is None for view in views):
        views = [np.ascontiguousarray(image) for image in images]
        pixel_bytes = 3
    addresses = [v.ctypes.data if pixel_bytes == 3 else extension.core().arrow_pixels(v) for v in views]
    mask = np.empty((height // LATENT_PX, width // LATENT_PX), np.uint8)
    *reference_addresses, target_address = addresses
    num_edited = extension.core().region_mask(
        reference_addresses, target_address, height, width, pixel_bytes, keep_scattered, mask.ctypes.data
    )
    return mask, num_edited


def _shared_pixels(image: RgbImage):
    """A capsule that shares Pillow's own pixels (4 bytes each), or None where they must be copied out.

    Copying two 1024x1024 images costs more than the whole pipeline. Pillow shares from 11.2 on, and only images that
    lie in one block of memory.
    """
    if not hasattr(image, "__arrow_c_array__"):
        return None
    try:
        return image.__arrow_c_array__()[1]
    except ValueError:
        return None


def _size(image: RgbImage, name: str) -> tuple[int, int]:
    """(width, height) of an RGB image."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise ValueError(f"{name}: mode {image.mode}, must be RGB")
        return image.size
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name}: {image.dtype} {list(image.shape)}, must be uint8 [H, W, 3]")
    return image.shape[1], image.shape[0]


def _resized(image: RgbImage, size: tuple[int, int], name: str) -> RgbImage:
    return image if _size(image, name) == size else _as_pil(image).resize(size, Image.Resampling.BICUBIC)


def _as_pil(image: RgbImage) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)
