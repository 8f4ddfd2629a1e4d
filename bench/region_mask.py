"""Region mask: the C++ pipeline against Pillow and OpenCV, one library call a step, on photo-like pairs.

All sides make the same mask from the same two pictures; that is checked before anything is timed.
"""

import functools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from timing import Samples, interleave

from uniworld.data.masks import region_mask
from uniworld.kernels import extension
from uniworld.kernels.registry import use_backend

PHOTOGRAPH = Path(__file__).resolve().parent.parent / "examples" / "coffee.jpg"
NOISE = {"exact background": 0.0, "noisy background": 5.0}  # standard deviation in grey levels
SIDES = ("ours", "ours, numpy arrays", "ours without C++", "step by step")

pytestmark = pytest.mark.skipif(not extension.has("region_mask"), reason=extension.MISSING or "built without it")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("background", NOISE)
@pytest.mark.parametrize("size_px", [512, 1024])
def test_region_mask(size_px, background, side, report):
    samples = measure(size_px, background)
    best = {name: min(samples[name].seconds) for name in (side, "step by step")}
    more = {"times_faster": best["step by step"] / best[side], "threads": torch.get_num_threads()}
    report("region_mask", f"{size_px} px, {background}", side, torch.uint8, samples[side], kind="cpu", **more)


@functools.cache
def measure(size_px: int, background: str) -> dict[str, Samples]:
    cv2.setNumThreads(torch.get_num_threads())
    reference, target = photo_pair(size_px, NOISE[background])
    arrays = np.array(reference), np.array(target)
    sides = {
        "ours": lambda: with_backend("cpp", reference, target),
        "ours, numpy arrays": lambda: with_backend("cpp", *arrays),
        "ours without C++": lambda: with_backend("torch", reference, target),
        "step by step": lambda: step_by_step(reference, target),
    }
    expected = sides["step by step"]()
    assert 0.1 < (expected > 0).mean() < 0.5
    for name, side in sides.items():
        np.testing.assert_array_equal(side(), expected, err_msg=name)
    return interleave({name: [side] for name, side in sides.items()})


def photo_pair(size_px: int, noise: float) -> tuple[Image.Image, Image.Image]:
    """A photograph and its edit: one object replaced, a smaller one too (which the 30 % rule drops), noise over all.

    With noise it is what a generating model leaves, with none what a compositing program does.
    """
    reference = Image.open(PHOTOGRAPH).convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC)
    place = Image.new("L", reference.size)
    draw = ImageDraw.Draw(place)
    for left, top, right, bottom in ((0.25, 0.2, 0.75, 0.7), (0.8, 0.8, 0.9, 0.9)):
        draw.ellipse([left * size_px, top * size_px, right * size_px, bottom * size_px], fill=255)
    replacement = reference.transpose(Image.Transpose.ROTATE_180).filter(ImageFilter.GaussianBlur(3))
    target = np.asarray(Image.composite(replacement, reference, place)).astype(np.float32)
    target += np.random.default_rng(0).normal(0, noise, target.shape)
    return reference, Image.fromarray(np.clip(target, 0, 255).astype(np.uint8))


def step_by_step(reference: Image.Image, target: Image.Image) -> np.ndarray:
    """The pipeline as a data loader would first write it; uint8 [H / 8, W / 8] of 0 and 255."""
    grey = np.array(ImageChops.difference(reference, target).convert("L"))
    _, changed = cv2.threshold(grey, 17, 255, cv2.THRESH_BINARY)
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    changed = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, ellipse)
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(changed, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = np.zeros_like(changed)
    for label in range(1, num_labels):
        if areas[label] / areas[1:].sum() >= 0.3:
            kept[labels == label] = 255
    pooled = torch.nn.functional.max_pool2d(torch.from_numpy(kept)[None].float(), 8)[0]
    return cv2.morphologyEx(pooled.numpy().astype(np.uint8), cv2.MORPH_CLOSE, ellipse)


def with_backend(backend: str, reference, target) -> np.ndarray:
    with use_backend(backend):
        return region_mask([reference], target)
