"""Pictures that see no turn before their own."""

import pytest
import torch
from PIL import Image

from uniworld.checkpoint import tiny
from uniworld.checkpoint.build import read_config
from uniworld.engine.request import Turn
from uniworld.models.prompts import PromptProcessor, TokenIds, VLMInputs, chat_text, sees_own_turn
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.parts.sizes import PREPROCESSOR
from uniworld.train.parts.vlm import load_vlm

PICTURE = Image.new("RGB", (128, 128), "red")


@pytest.fixture(scope="module", params=["right", "left"])
def processor(request):
    vision = VisionProcessor(PREPROCESSOR)
    return PromptProcessor(
        load_tokenizer(tiny.PACKAGED, "Qwen2Tokenizer"), vision, padding_side=request.param, own_turn=True
    )


def asked(*said):
    """Questions with their answers, and a picture behind the last."""
    *earlier, last = said
    return chat_text(last, 1, [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(earlier)])


def test_who_sees_whom_is_as_told():
    tokens = TokenIds(turn_start=1, turn_end=2, vision_start=3, image_pad=4, vision_end=5, assistant=6, pad=0)
    ids = torch.tensor([[1, 9, 2, 1, 8, 4, 4, 2, 1, 6], [1, 9, 4, 2, 0, 0, 0, 0, 0, 0]])
    seen = sees_own_turn(ids, ids != 0, tokens)
    for row in range(2):
        for i in range(10):
            for j in range(10):
                expected = j <= i and ids[row, j] != 0
                if row == 0 and i in (5, 6) and j < 3:  # the picture's tokens, and the turn before theirs
                    expected = False
                assert seen[row, i, j] == (expected or i == j), (row, i, j)
    assert sees_own_turn(ids[1:], ids[1:] != 0, tokens) is None


def test_one_turn_needs_no_mask(processor):
    assert processor.encode([asked("what is this?")], [[PICTURE]]).sees is None
    plain = PromptProcessor(processor.tokenizer, processor.vision)
    assert plain.encode([asked("what is this?", "a ball", "where?")], [[PICTURE]]).sees is None


def test_a_picture_does_not_see_earlier_turns_and_words_do(processor):
    """In one layer: a picture's states are the same whatever was asked before; those of its turn's words are not."""
    torch.manual_seed(0)
    vlm = VisionLanguageModel.from_config(read_config(tiny.PACKAGED))  # untrained, it looks everywhere
    vlm.model.model.language_model.layers = vlm.model.model.language_model.layers[:1]
    talks = [("is there a red ball", "no", "where is the cube"), ("is there a red cube", "yes", "where is the cube")]
    for own_turn in (True, False):
        inputs = processor.encode([*(asked(*talk) for talk in talks), asked("a")], [[PICTURE]] * 3)
        if not own_turn:
            inputs = VLMInputs.from_ids(
                inputs.input_ids, inputs.attention_mask, processor.tokens, inputs.pixel_values, inputs.image_grid_thw
            )
        states = vlm.encode(inputs).hidden_states
        assert states.isfinite().all()
        of_picture = [states[row][inputs.mm_token_type_ids[row].bool()] for row in range(2)]
        first = [end[0] - len(of_picture[0]) for end in inputs.image_end_positions[:2]]
        of_words = [states[row, column - 5 : column] for row, column in enumerate(first)]
        assert torch.allclose(*of_picture, atol=1e-5) == own_turn
        assert float((of_words[0] - of_words[1]).abs().max()) > 1e-3


def test_a_batch_is_as_its_prompts_alone(processor):
    """Padding changes nothing, and a prompt of one turn is as it is without a mask."""
    vlm = load_vlm(tiny.PACKAGED)
    prompts = [asked("is there a red ball", "no", "where is the cube"), asked("what is this?")]
    together = processor.encode(prompts, [[PICTURE]] * 2)
    states = vlm.encode(together).hidden_states
    for row, prompt in enumerate(prompts):
        alone = processor.encode([prompt], [[PICTURE]])
        expected = vlm.encode(alone).hidden_states[0]
        assert torch.allclose(states[row][together.attention_mask[row].bool()], expected, atol=1e-4)
