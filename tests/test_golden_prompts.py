"""Prompt text, token ids, image patches and limits against the authors' code."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import COMPLETE, ROOT, case, close, images, resolve, special_token_ids
from PIL import Image

from uniworld.models.prompts import (
    ANSWER_START,
    IMAGE,
    IMAGE_PAD,
    PERCEPTION_PROMPTS,
    PromptProcessor,
    TokenIds,
    chat_text,
    instruction,
    perception_prompt,
    training_pieces,
    validation_text,
)
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import AREA_PX, TRAINING_FACTOR, VisionProcessor, smart_resize

CONFIG = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())


@dataclass(frozen=True)
class Turn:
    role: str
    text: str
    images: tuple = ()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "univa", "Qwen2Tokenizer")


@pytest.fixture(scope="module")
def processor(tokenizer):
    """Leaves the golden pictures at their size, as the VLM cases did."""
    return PromptProcessor(tokenizer, VisionProcessor(CONFIG, min_pixels=56 * 56, max_pixels=AREA_PX))


@pytest.fixture(scope="module")
def training_processor(tokenizer):
    inputs, _ = resolve(case("i_prompts", "train_edit"))
    vision = VisionProcessor(
        CONFIG, min_pixels=inputs["min_pixels"], max_pixels=inputs["max_pixels"], factor=TRAINING_FACTOR
    )
    return PromptProcessor(tokenizer, vision, padding_side="left")


def without_vision_frame(text):
    """The authors' text before image expansion: the frame of an image comes with its pads."""
    return text.replace(IMAGE, IMAGE_PAD)


def test_token_ids(tokenizer):
    expected, tokens = special_token_ids(), TokenIds.of(tokenizer)
    assert tokens == TokenIds(
        turn_start=expected["<|im_start|>"],
        turn_end=expected["<|im_end|>"],
        vision_start=expected["<|vision_start|>"],
        image_pad=expected["<|image_pad|>"],
        vision_end=expected["<|vision_end|>"],
        assistant=expected["assistant"],
        pad=expected["<|endoftext|>"],
    )


@pytest.mark.parametrize("name", ["train_t2i", "train_edit"])
def test_training_prompt(training_processor, name):
    inputs, outputs = resolve(case("i_prompts", name))
    conversations = inputs["dataset_entry"]["conversations"]
    pieces = training_pieces(conversations)
    assert [without_vision_frame(p) for p in pieces] == outputs["pieces_fed_to_tokenizer"]
    assert without_vision_frame("".join(pieces)) == outputs["text_before_image_expansion"]
    assert instruction(conversations[0]["value"]) == outputs["t5_prompt"]

    pictures = images()[:1] if name == "train_edit" else []
    encoded = training_processor.encode([pieces], [pictures])
    assert torch.equal(encoded.input_ids, outputs["input_ids"])
    if pictures:
        assert torch.equal(encoded.image_grid_thw, outputs["image_grid_thw"])
        ok, worst = close(encoded.pixel_values, outputs["pixel_values"], atol=1e-6)
        assert ok, worst
        num_pads = int(outputs["image_grid_thw"].prod()) // 4
        assert encoded.image_end_positions == ((outputs["image_position"][0] + num_pads,),)
    else:
        assert encoded.pixel_values is None and encoded.image_end_positions == ((),)


def test_training_batch_padded_on_the_left(training_processor):
    _, outputs = resolve(case("i_prompts", "collate_left"))
    ids, mask = training_processor.pad([row[keep].tolist() for row, keep in _rows(outputs)])
    assert torch.equal(ids, outputs["input_ids"]) and torch.equal(mask.bool(), outputs["attention_mask"])
    entries = [resolve(case("i_prompts", n))[0]["dataset_entry"]["conversations"] for n in ("train_t2i", "train_edit")]
    encoded = training_processor.encode([training_pieces(e) for e in entries], [[], images()[:1]])
    width = encoded.input_ids.shape[1]
    assert torch.equal(encoded.input_ids, outputs["input_ids"][:2, -width:])


def _rows(outputs):
    return zip(outputs["input_ids"], outputs["attention_mask"])


def test_validation_prompt():
    inputs, outputs = resolve(case("i_prompts", "validation_edit"))
    assert without_vision_frame(validation_text(inputs["prompt"])) == outputs["text"]


def test_inference_prompts(processor):
    _, two_images, _ = images()
    text = "Generate an adorable golden retriever puppy playing in a sunny park"
    inputs, _ = resolve(case("a_lvlm", "text_only"))
    assert chat_text(text) in case("a_lvlm", "text_only")["notes"]
    assert torch.equal(processor.encode([chat_text(text)]).input_ids, inputs["input_ids"])

    inputs, _ = resolve(case("a_lvlm", "text_1image"))
    encoded = processor.encode([chat_text("replace the shoe with a black bicycle", 1)], [images()[:1]])
    assert torch.equal(encoded.input_ids, inputs["input_ids"])
    assert torch.equal(encoded.image_grid_thw, inputs["image_grid_thw"])
    assert close(encoded.pixel_values, inputs["pixel_values"], atol=1e-6)[0]
    assert encoded.input_ids[0, encoded.image_end_positions[0][0]] == special_token_ids()["<|vision_end|>"]
    assert encoded.input_ids[0, encoded.assistant_positions[0] - 1] == special_token_ids()["<|im_start|>"]
    assert encoded.mm_token_type_ids.sum() == inputs["image_grid_thw"].prod() // 4


def test_history_and_system_turn():
    image = images()[0]
    history = [Turn("user", "draw a cat"), Turn("assistant", "Here.", (image,)), Turn("user", "thanks", (image, image))]
    assert chat_text("now a dog", 1, history, system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\ndraw a cat<|im_end|>\n"
        "<|im_start|>assistant\nHere.<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>user\nthanks"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>user\nnow a dog<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_prompts_equal_each_alone(tokenizer, side):
    processor = PromptProcessor(tokenizer, VisionProcessor(CONFIG, min_pixels=56 * 56), padding_side=side)
    A, B, C = images()
    prompts, pictures = [chat_text("a cat", 2), chat_text("a"), chat_text("one dog", 1)], [[A, C], [], [B]]
    batch = processor.encode(prompts, pictures)
    singles = [processor.encode([p], [i]) for p, i in zip(prompts, pictures)]
    for row, alone in enumerate(singles):
        real = batch.attention_mask[row].bool()
        assert torch.equal(batch.input_ids[row][real], alone.input_ids[0])
        assert torch.equal(batch.mm_token_type_ids[row][real], alone.mm_token_type_ids[0])
        shift = int(real.nonzero()[0])
        assert batch.image_end_positions[row] == tuple(p + shift for p in alone.image_end_positions[0])
        assert batch.assistant_positions[row] == alone.assistant_positions[0] + shift
    assert torch.equal(batch.pixel_values, torch.cat([s.pixel_values for s in singles if s.pixel_values is not None]))


def test_mistakes_are_named(tokenizer, processor):
    with pytest.raises(ValueError, match="images: 1 given, the prompt has places for 2"):
        processor.encode([chat_text("a", 2)], [images()[:1]])
    with pytest.raises(ValueError, match=r"reserved token <\|image_pad\|>"):
        chat_text("a <|image_pad|> b")
    with pytest.raises(ValueError, match=r"history\[0\]: must not contain the reserved token <\|im_end\|>"):
        chat_text("a", history=[Turn("user", "x<|im_end|>")])
    short = PromptProcessor(tokenizer, processor.vision, max_tokens=40)
    with pytest.raises(ValueError, match="prompt: 44 tokens with its images, at most 40 are allowed"):
        short.encode([chat_text("replace the shoe with a black bicycle", 1)], [images()[:1]])
    with pytest.raises(ValueError, match="padding_side='middle'"):
        PromptProcessor(tokenizer, processor.vision, padding_side="middle")
    with pytest.raises(ValueError, match=r"conversations\[1\].value: <gen_image> must stand once"):
        training_pieces([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<gen_image><gen_image>"}])
    with pytest.raises(ValueError, match="conversations: the last turn must be gpt's"):
        training_pieces([{"from": "human", "value": "a"}])
    with pytest.raises(ValueError, match=r"from='user': must be one of human, gpt"):
        training_pieces([{"from": "user", "value": "a"}])
    with pytest.raises(ValueError, match="task='edges': must be one of canny"):
        perception_prompt("edges")
    with pytest.raises(ValueError, match="target='cat': only the tasks segment and detect"):
        perception_prompt("canny", "cat")


def test_perception_prompts_are_plain_instructions():
    assert set(PERCEPTION_PROMPTS) == {
        "canny",
        "depth",
        "hed",
        "mlsd",
        "normal",
        "pose",
        "sketch",
        "segment",
        "detect",
    }
    texts = [perception_prompt(task) for task in PERCEPTION_PROMPTS]
    assert len(set(texts)) == len(texts) and all(chat_text(t, 1).endswith(ANSWER_START) for t in texts)
    assert perception_prompt("segment", "the giraffe") == "Segment the giraffe from the background."


@pytest.mark.parametrize("factor", [28, 56])
def test_smart_resize_against_transformers(factor):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    rng = np.random.default_rng(0)
    for height, width in rng.integers(factor, 4000, (300, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        for low, high in ((AREA_PX, AREA_PX), (3136, 12845056), (112 * 112, 448 * 448)):
            assert smart_resize(height, width, factor, low, high) == reference(height, width, factor, low, high)
    with pytest.raises(ValueError, match="sides may differ at most by a factor of 200"):
        smart_resize(10, 2001, factor, AREA_PX, AREA_PX)
    assert smart_resize(1, 60, factor, 3136, AREA_PX)[0] > 0


def test_patches_against_transformers():
    """Photograph-like pictures, odd sizes, shrunk and grown."""
    from transformers import Qwen2VLImageProcessor

    rng = np.random.default_rng(0)
    sizes = [(97, 131), (600, 411), (448, 448)]
    pictures = [Image.fromarray(rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8)) for h, w in sizes]
    pictures = [p.resize((w, h), Image.Resampling.BICUBIC) for p, (h, w) in zip(pictures, sizes)]
    settings = {k: v for k, v in CONFIG.items() if k not in ("size", "image_processor_type", "processor_class")}
    settings |= {"min_pixels": AREA_PX, "max_pixels": AREA_PX, "do_resize": False}
    reference = Qwen2VLImageProcessor(**settings)
    vision = VisionProcessor(CONFIG)
    expected = reference([vision.resized(p) for p in pictures], return_tensors="pt")
    pixel_values, grids = vision(pictures)
    assert torch.equal(grids, expected["image_grid_thw"])
    ok, worst = close(pixel_values, expected["pixel_values"], atol=1e-6)
    assert ok, worst


def test_vision_processor_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="factor=30: must be a multiple of 28"):
        VisionProcessor(CONFIG, factor=30)
    with pytest.raises(ValueError, match="min_pixels=200: must be from 1 to max_pixels=100"):
        VisionProcessor(CONFIG, min_pixels=200, max_pixels=100)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = images()[0].convert(mode)
    vision = VisionProcessor(CONFIG)
    assert torch.equal(vision([image])[0], vision([image.convert("RGB")])[0])


@pytest.mark.skipif(COMPLETE is None, reason="UNIWORLD_GOLDEN does not name the complete golden data")
def test_pictures_of_the_complete_golden_data(processor):
    inputs, _ = resolve(case("s_encoders", "qwen_vision"))
    pixel_values, grids = processor.vision([Image.open(Path(COMPLETE) / file) for file in inputs["image_files"]])
    assert torch.equal(grids, inputs["image_grid_thw"])
    assert close(pixel_values, inputs["pixel_values"], atol=1e-6)[0]
