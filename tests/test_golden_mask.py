"""Region masks and weights: the authors' results exactly, and the C++ pipeline against Pillow and OpenCV.

The authors' own pictures are not in this repository; with `UNIWORLD_GOLDEN` naming the folder of the complete golden
data their masks are computed too. Their weights are always checked, from the stored masks.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniworld.data.masks import EditTooSmallError, focus_weight, region_mask, region_mask_reference, region_weight
from uniworld.kernels import extension
from uniworld.kernels.registry import use_backend

DATA = Path(__file__).parent / "data" / "golden_mask"
COMPLETE = os.environ.get("UNIWORLD_GOLDEN")
CASES = json.loads((DATA / "cases.json").read_text())
ARRAYS = np.load(DATA / "arrays.npz")
AUTHORS_PICTURES = ("nike", "replace", "seg", "det", "extract")
WITH_PICTURES = [c for c in CASES if COMPLETE or not c["name"].startswith(AUTHORS_PICTURES)]
needs_core = pytest.mark.skipif(not extension.has("region_mask"), reason=extension.MISSING or "built without it")
BACKENDS = [pytest.param("cpp", marks=needs_core), "torch"]  # "torch" is the Pillow/OpenCV reference


def load_picture(name: str) -> Image.Image:
    """A picture of a case; the edited chelseas are stored as the pixels that differ."""
    if f"{name}/changed" in ARRAYS:
        pixels = np.array(Image.open(DATA / "chelsea.png").convert("RGB"))
        changed = np.unpackbits(ARRAYS[f"{name}/changed"]).astype(bool).reshape(pixels.shape[:2])
        pixels[changed] = ARRAYS[f"{name}/values"]
        return Image.fromarray(pixels)
    path = DATA / name if (DATA / name).exists() else Path(COMPLETE) / "mask_images" / name
    return Image.open(path).convert("RGB")


def stored_mask(case: dict) -> np.ndarray:
    height, width = case["shape"]
    bits = np.unpackbits(ARRAYS[f"masks/{case['mask']}"])[: height * width]
    return bits.reshape(height, width) * np.uint8(255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_arrays", [False, True], ids=["pil", "numpy"])
@pytest.mark.parametrize("case", WITH_PICTURES, ids=lambda case: case["name"])
def test_mask_and_weight_are_the_authors(case, as_arrays, backend):
    *references, target = (load_picture(name) for name in case["images"])
    if as_arrays:
        references, target = [np.asarray(image) for image in references], np.asarray(target)
    with use_backend(backend):
        if "refused_share" in case:
            with pytest.raises(EditTooSmallError, match=str(case["refused_share"])) as refusal:
                region_mask(references, target)
            assert isinstance(refusal.value, ValueError)
            return
        mask = region_mask(references, target, need_weight=case["need_weight"])
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, stored_mask(case))


@pytest.mark.parametrize("case", [c for c in CASES if "mask" in c], ids=lambda case: case["name"])
def test_weight_is_the_authors(case):
    mask = stored_mask(case)
    weight = region_weight(mask, case["kind"])
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, np.where(mask > 0, np.float32(case["weight"]), np.float32(1)))


@pytest.mark.parametrize(
    "kind, expected", [("linear", 4.0), ("exp", 2.0), ("log", 3.0), ("sqrt", 2.0)]
)
def test_weight_formulas(kind, expected):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 255  # x = 4
    weight = region_weight(mask, kind)
    assert set(weight[mask > 0]) == {expected} and set(weight[mask == 0]) == {1}
    assert set(region_weight(np.ones((8, 8), np.uint8), kind).flat) == {1}


def test_weight_rounding():
    mask = np.zeros((5, 1), np.uint8)
    mask[0] = 255  # x = 5, log2(5) + 1 = 3.32192809...
    assert region_weight(mask, "log")[0, 0] == np.float32(3.321928)


def test_focus_weight_is_how_much_of_a_latent_a_box_covers():
    """Against a box that is drawn with 100 points a latent pixel and counted."""
    boxes = [(0.1, 0.22, 0.57, 0.4), (0.53, 0.3, 1.0, 0.97), (-0.4, 0.9, 0.02, 1.3)]
    y, x = (np.indices((80, 60)) + 0.5) / [[[80]], [[60]]]
    drawn = [((x > left) & (x < right) & (y > upper) & (y < lower)) for left, upper, right, lower in boxes]
    counted = np.max([box.reshape(8, 10, 6, 10).mean((1, 3)) for box in drawn], axis=0)
    weight = focus_weight(boxes, (8, 6), 5.0)
    assert weight.dtype == np.float32 and weight.shape == (8, 6) and weight.min() == 1 and weight.max() == 5
    np.testing.assert_allclose(weight, 1 + 4 * counted, atol=4 * 0.1)
    assert (focus_weight([], (8, 6), 5.0) == 1).all() and (focus_weight(boxes, (8, 6), 1.0) == 1).all()
    np.testing.assert_array_equal(focus_weight([(0.25, 0.5, 0.5, 0.75)], (4, 4), 2)[2], [1, 2, 1, 1])


def test_bad_arguments():
    pixels = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="kind='square': must be one of linear, exp, log, sqrt"):
        region_weight(pixels[..., 0] + 1, "square")
    with pytest.raises(ValueError, match="no edited pixel"):
        region_weight(pixels[..., 0])
    with pytest.raises(ValueError, match="at least 8x8"):
        region_mask([pixels[:7]], pixels[:7])
    with pytest.raises(ValueError, match="target: mode L"):
        region_mask([pixels], Image.new("L", (16, 16)))
    with pytest.raises(ValueError, match=r"references\[0\]: float32"):
        region_mask([pixels.astype(np.float32)], pixels)


def random_pair(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    height, width = rng.integers(8, 210, 2)
    reference = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise = rng.integers(0, 256, reference.shape, dtype=np.uint8)
    if kind == "all changed":
        return reference, reference ^ 255
    if kind == "nothing changed":
        return reference, reference.copy()
    if kind == "unrelated":
        return reference, noise
    if kind == "scattered":
        return reference, np.where(rng.random((height, width, 1)) < rng.random() ** 4, noise, reference)
    if kind == "near the threshold":
        shift = rng.integers(-30, 31, reference.shape) * (rng.random((height, width, 1)) < 0.1)
        return reference, np.clip(reference + shift, 0, 255).astype(np.uint8)
    target = reference.copy()  # rectangles, some of which cross the border
    for _ in range(rng.integers(1, 12)):
        top, left, rows, columns = rng.integers(0, (height, width, 60, 60))
        target[top : top + rows, left : left + columns] ^= 255
    return reference, target


KINDS = ["all changed", "nothing changed", "unrelated", "scattered", "near the threshold", "rectangles"]


@needs_core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_scattered", [False, True])
def test_core_equals_opencv(kind, keep_scattered):
    core = compiled_pipeline(keep_scattered)
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(30):
        reference, target = random_pair(rng, kind)
        second = np.roll(reference, 1, axis=0)
        for references in ([reference], [reference, second]):
            expected, num_expected = region_mask_reference(references, target, keep_scattered)
            for convert in (np.asarray, Image.fromarray, np.asfortranarray):
                mask, num_edited = core([convert(r) for r in references], convert(target))
                assert num_edited == num_expected, (kind, target.shape)
                np.testing.assert_array_equal(mask, expected, err_msg=f"{kind} {target.shape}")


def compiled_pipeline(keep_scattered: bool):
    from uniworld.data.masks import _pipeline_core  # the bare pipeline, before the checks on the edited share

    return lambda references, target: _pipeline_core(references, target, keep_scattered)


@needs_core
def test_core_equals_opencv_on_a_large_picture():
    """Larger than the 16 MiB up to which Pillow keeps a picture in one block that can be shared."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (2100, 2051, 3), dtype=np.uint8)
    target = np.where(rng.random((2100, 2051, 1)) < 0.05, reference ^ 64, reference)
    target[300:1500, 400:1900] ^= 255
    expected, num_expected = region_mask_reference([reference], target)
    for convert in (np.asarray, Image.fromarray):
        mask, num_edited = compiled_pipeline(False)([convert(reference)], convert(target))
        assert num_edited == num_expected
        np.testing.assert_array_equal(mask, expected)


@needs_core
def test_grey_threshold_on_boundary_colours():
    """Colours whose grey value is 17 or 18: the fixed-point sums are Pillow's to the last bit."""
    colours = np.stack(np.meshgrid(*[np.arange(160, dtype=np.uint8)] * 3, indexing="ij"), -1).reshape(1, -1, 3)
    grey = np.asarray(Image.fromarray(colours).convert("L"))[0]
    boundary = np.flatnonzero((grey == 17) | (grey == 18))[::23]
    assert len(boundary) > 500
    core = compiled_pipeline(False)
    black = np.zeros((16, 16, 3), np.uint8)  # one vector of 8 pixels and a rest a row
    for i in boundary:
        flat = np.broadcast_to(colours[0, i], black.shape)
        for convert in (np.asarray, Image.fromarray):
            assert core([convert(black)], convert(flat))[1] == (256 if grey[i] >= 18 else 0), colours[0, i]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scattered_edits(backend):
    """Many small edits are a reconstruction by the authors' rule, and kept on request."""
    reference = np.zeros((256, 256, 3), np.uint8)
    target = reference.copy()
    for top in range(0, 256, 64):
        for left in range(0, 256, 64):
            target[top + 16 : top + 32, left + 16 : left + 32] = 200
    target[0, 0] = 200  # a speck, under one latent pixel
    with use_backend(backend):
        assert (region_mask([reference], target) == 255).all()
        kept = region_mask([reference], target, keep_scattered=True)
        expected = np.zeros((32, 32), np.uint8)
        for top in range(2, 32, 8):
            for left in range(2, 32, 8):
                expected[top : top + 2, left : left + 2] = 255
        np.testing.assert_array_equal(kept, expected)
        one_large = target.copy()
        one_large[100:228, 100:228] = 200
        assert np.array_equal(
            region_mask([reference], one_large), region_mask([reference], one_large, keep_scattered=True)
        )


@pytest.mark.parametrize("backend, core", [("auto", True), ("cpp", True), ("triton", True), ("torch", False)])
@needs_core
def test_forced_backend_is_taken(backend, core, monkeypatch):
    taken = []
    name = "_pipeline_core" if core else "region_mask_reference"
    monkeypatch.setattr(f"uniworld.data.masks.{name}", lambda *_: (taken.append(name), (np.ones((2, 2)), 256))[1])
    black = np.zeros((16, 16, 3), np.uint8)
    with use_backend(backend):
        region_mask([black], black)
    assert taken == [name]


def test_forced_core_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(extension, "_core", None)
    black = np.zeros((16, 16, 3), np.uint8)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="region_mask has no C\\+\\+ version here"):
        region_mask([black], black)
    assert (region_mask([black], black) == 255).all()


def test_reference_of_another_size_is_resized():
    picture = load_picture("chelsea.png")
    larger = picture.resize((896, 672), Image.Resampling.BICUBIC)
    expected = region_mask([larger.resize(picture.size, Image.Resampling.BICUBIC)], load_picture("chelsea_rect.png"))
    assert 0 < (expected > 0).mean() < 0.2
    for reference in (larger, np.asarray(larger)):
        np.testing.assert_array_equal(region_mask([reference], load_picture("chelsea_rect.png")), expected)
