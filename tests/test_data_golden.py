"""Training samples against the authors' dataset: target, ids, patches, weights, collation."""

import json

import numpy as np
import pytest
import torch
from golden import COMPLETE, ROOT, case, close, images, resolve
from PIL import Image

from uniworld.config import DataConfig
from uniworld.data.buckets import bucket_of, centre_box, cropped, stretched, target_tensor
from uniworld.data.collate import Collator, training_processor
from uniworld.data.masks import region_mask, region_weight
from uniworld.data.samples import Picture, make_sample
from uniworld.models.prompts import PromptProcessor
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor

CONFIG = DataConfig(anchor_px=4096, num_ratios=1, vlm_max_px=12544)
PREPROCESSOR = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return PromptProcessor(load_tokenizer(ROOT / "univa", "Qwen2Tokenizer"), VisionProcessor(PREPROCESSOR))


def encoded(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def siglip_preprocess(pictures):
    from uniworld.models.siglip import SemanticEncoder

    config = json.loads((ROOT / "siglip" / "preprocessor_config.json").read_text())
    return SemanticEncoder(torch.nn.Identity(), config).preprocess(pictures)


def sample_of(name: str, pictures: list[Picture]):
    entry = resolve(case("i_prompts", name))[0]["dataset_entry"]
    return make_sample(name, entry["conversations"], pictures)


def test_ids_patches_and_words(processor):
    """The target's pixels are not packaged; any picture of its size gives the same prompt."""
    A, target = images()[0], Picture("target", encoded(images()[0]))
    collator = Collator(CONFIG, processor, siglip_preprocess)
    for name, pictures in {"train_t2i": [target], "train_edit": [Picture("A", encoded(A)), target]}.items():
        _, outputs = resolve(case("i_prompts", name))
        batch = collator.collate([collator.prepare(sample_of(name, pictures))])
        assert torch.equal(batch.inputs.input_ids, outputs["input_ids"])
        assert batch.instructions == (outputs["t5_prompt"],)
        assert batch.target.shape[1:] == outputs["generated_image"].shape
        if name == "train_t2i":
            assert batch.inputs.pixel_values is None and batch.siglip_pixels is None
            continue
        assert torch.equal(batch.inputs.image_grid_thw, outputs["image_grid_thw"])
        assert close(batch.inputs.pixel_values, outputs["pixel_values"], atol=1e-6)[0]
        ok, worst = close(batch.siglip_pixels, outputs["siglip_pixel_values"], atol=1e-6)
        assert ok, worst


def test_batch_is_padded_on_the_left(processor):
    """As the authors' collation pads, up to the third sample's length, which is not packaged."""
    A = Picture("A", encoded(images()[0]))
    collator = Collator(CONFIG, processor)
    samples = [sample_of("train_t2i", [A]), sample_of("train_edit", [A, A])]
    batch = collator.collate([collator.prepare(sample) for sample in samples])
    _, outputs = resolve(case("i_prompts", "collate_left"))
    width = batch.inputs.input_ids.shape[1]
    assert torch.equal(batch.inputs.input_ids, outputs["input_ids"][:2, -width:])
    assert torch.equal(batch.inputs.attention_mask.bool(), outputs["attention_mask"][:2, -width:].bool())
    assert batch.region_weight is None  # the pair is equal, so it is a reconstruction


@pytest.mark.skipif(COMPLETE is None, reason="UNIWORLD_GOLDEN does not name the complete golden data")
def test_target_and_weights(processor):
    from pathlib import Path

    A, B = (Picture(p, p) for p in (f"{COMPLETE}/images/A.png", f"{COMPLETE}/images/A_edit.png"))
    assert Path(A.name).is_file()
    inputs, outputs = resolve(case("i_prompts", "train_edit"))
    collator = Collator(CONFIG, processor)
    prepared = collator.prepare(sample_of("train_edit", [A, B]))
    assert close(prepared.target, outputs["generated_image"], atol=1e-6)[0]
    # The authors compare the pictures at the VLM's size; ours is at the target's, where the loss is.
    vision = collator.processor.vision
    at_vlm_size = region_mask([vision.resized(A.read())], vision.resized(B.read()))
    weight = torch.from_numpy(region_weight(at_vlm_size, inputs["mask_weight_type"]))
    assert torch.equal(weight[None], outputs["weights"])
    assert prepared.region_weight.shape == (1, 8, 8)
    assert set(prepared.region_weight.unique().tolist()) == {1.0, prepared.region_weight.max().item()}
    assert prepared.region_weight.max() > 1.5


def test_target_is_antialiased_bicubic():
    """Against an independent reference: Pillow's own filter on each colour as floats."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (97, 131, 3), np.uint8)
    mine = target_tensor(Image.fromarray(pixels), (64, 32))
    bands = [Image.fromarray(pixels[:, :, c].astype(np.float32)) for c in range(3)]
    expected = np.stack([np.asarray(band.resize((32, 64), Image.Resampling.BICUBIC)) for band in bands])
    ok, worst = close(mine, expected / 127.5 - 1, atol=2e-5)
    assert ok, worst


def test_crop_keeps_the_middle():
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    box = centre_box(100, 300, (64, 64))
    assert cropped(image, box).size == (100, 100)
    assert (np.asarray(stretched(cropped(image, box), (64, 64))) == 255).all()
    assert centre_box(64, 64, (32, 32)) == (0, 0, 1, 1)
    assert cropped(Image.new("RGB", (1, 900)), centre_box(900, 1, (64, 64))).size == (1, 1)


def test_buckets_are_the_sizes_of_inference():
    config = DataConfig(anchor_px=512 * 512)
    assert bucket_of(1080, 1920, config) == (288, 512)
    assert bucket_of(640, 480, config) == (640, 480)
    assert bucket_of(700, 700, config) == (512, 512)


def test_huge_targets_are_shrunk_first(monkeypatch):
    from uniworld.data import buckets

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).resize((640, 640))
    exact = target_tensor(image, (64, 64))
    monkeypatch.setattr(buckets, "MAX_FLOAT_PX", 1000)
    assert (target_tensor(image, (64, 64)) - exact).abs().max() < 0.02


def test_training_processor_keeps_the_model_settings(processor):
    training = training_processor(processor, CONFIG)
    assert training.padding_side == "left" and training.vision.factor == 56
    assert training.vision.min_pixels == training.vision.max_pixels == CONFIG.vlm_max_px
    assert training.tokenizer is processor.tokenizer
