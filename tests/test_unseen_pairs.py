"""Pairs of shape and colour that are held out: training does not teach that they cannot be."""

import numpy as np
import pytest
import torch

from uniworld.data.scenes.graph import COLOURS, SHAPES, Scene, Thing, is_held_out
from uniworld.data.scenes.questions import converse
from uniworld.data.scenes.tasks import make_item
from uniworld.data.scenes.wording import wording
from uniworld.models.tokenizers import load_tokenizer
from uniworld.train.parts.conversations import IGNORED
from uniworld.train.parts.dense import OF_A_THING, DenseHead, only_seen
from uniworld.train.parts.grounding import descriptions
from uniworld.train.parts.unseen_words import UnseenWords, unseen_answers


@pytest.fixture(scope="module")
def tokenizer(words):
    return load_tokenizer(words, "Qwen2Tokenizer")


@pytest.fixture(scope="module")
def unseen(tokenizer):
    return UnseenWords(lambda text: tokenizer(text).input_ids)


def test_classes_that_training_cannot_show_take_no_part():
    for shape in range(1 + len(SHAPES)):
        for colour in range(1 + len(COLOURS)):
            thing = torch.tensor([[shape, colour, 0, 0]])
            for field, names in OF_A_THING.items():
                left = only_seen(field, torch.zeros(1, 1 + len(names)), thing)[0].isfinite().tolist()
                expected = [True] * (1 + len(names))
                for other in range(1, 1 + len(names)):
                    if field == "shape" and colour:
                        expected[other] = not is_held_out(SHAPES[other - 1], tuple(COLOURS)[colour - 1])
                    if field == "colour" and shape:
                        expected[other] = not is_held_out(SHAPES[shape - 1], tuple(COLOURS)[other - 1])
                assert left == expected, (field, shape, colour)


def test_a_held_out_pair_gets_no_gradient():
    """All things are blue: no point says that none of them is the shape that is held out in blue."""
    head, points = DenseHead(8, 2), torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    held_out = next(shape for shape in SHAPES if is_held_out(shape, "blue"))
    points[..., 0] = 1 + SHAPES.index(next(shape for shape in SHAPES if shape != held_out))
    points[..., 1] = 1 + tuple(COLOURS).index("blue")
    labels = {"points": points, "whole": torch.zeros(1, 3, dtype=torch.uint8), "surface": torch.zeros(1, 4, 4, 4)}
    head(torch.randn(1, 4, 8), labels)[0].backward()
    gradient = head.points.bias.grad.view(4, -1)[:, : 1 + len(SHAPES)]
    without = gradient[:, 1 + SHAPES.index(held_out)]
    assert (without == 0).all() and (gradient != 0).sum() == gradient.numel() - len(without)


@pytest.mark.parametrize("language, joint, at_least", [("en", " ", 20), ("zh", "", 20), ("zh", "的", 3)])
def test_no_shape_is_unlearned_behind_a_colour(unseen, tokenizer, language, joint, at_least):
    words = wording(language, np.random.default_rng(0))
    num_found = 0
    for colour in COLOURS:
        held_out = next(shape for shape in SHAPES if is_held_out(shape, colour))
        said = words.canonical("COLOURS", colour) + joint
        wanted, before = (tokenizer(text).input_ids for text in (said + words.shape(held_out), said.rstrip()))
        for shape in SHAPES:
            ids = tokenizer(said + words.shape(shape)).input_ids
            found = unseen.find(torch.tensor([[IGNORED, *ids]])).tolist()
            assert all(at >= len(before) and token != ids[at] for at, token in found)
            # Where a noun melts with the end of the colour, tokens before it are not the colour's.
            if shape != held_out and ids[: len(before)] == wanted[: len(before)] == before:
                assert [len(before), wanted[len(before)]] in found, (colour, shape, found)
                num_found += 1
    assert num_found >= at_least


def test_answers_that_training_cannot_have_are_not_unlearned(unseen, tokenizer):
    """Of many questions: nothing that is right is left out, and what is left out would begin an unseen answer."""
    num_left = dict.fromkeys(("shape", "colour"), 0)
    for seed in range(150):
        item = make_item("understanding", seed, size_px=16)
        words = wording(item.language, np.random.default_rng(seed))
        for question in converse(item.scenes[0], words, "train", 6):
            answers = unseen_answers(question, item.scenes[0], words)
            assert question.answer not in answers
            ids = tokenizer(question.answer).input_ids
            for at, token in unseen.find(torch.tensor([[IGNORED, *ids]]), [answers]).tolist():
                assert token != ids[at]
                if question.kind in num_left:
                    num_left[question.kind] += 1
                    begun = [tokenizer(answer).input_ids[: at + 1] == [*ids[:at], token] for answer in answers]
                    assert any(begun), (question, tokenizer.decode([token]))
    assert min(num_left.values()) > 3, num_left


def test_an_answer_is_the_one_that_the_held_out_thing_would_have():
    held_out = next(shape for shape in SHAPES if is_held_out(shape, "blue"))
    shape = next(shape for shape in SHAPES if shape != held_out)
    scene = Scene(things=(Thing(shape=shape, colour="blue"),))
    words = wording("en", np.random.default_rng(0))
    wordings = [wording("en", np.random.default_rng(seed)) for seed in range(20)]
    asked = {question.kind: question for said in wordings for question in converse(scene, said, "train", 9)}
    assert unseen_answers(asked["shape"], scene, words) == (words.shape(held_out),)
    colours = {words.canonical("COLOURS", colour) for colour in COLOURS if is_held_out(shape, colour)}
    assert set(unseen_answers(asked["colour"], scene, words)) == colours
    assert unseen_answers(asked["background"], scene, words) == ()


def test_what_is_never_shown_is_not_described_as_absent():
    for seed in range(300):
        item = make_item("understanding", seed, size_px=16)
        words = wording(item.language, np.random.default_rng(seed))
        for described in descriptions(item.scenes[0], words, 6):
            meant = described.about[0]
            assert not (meant.shape and meant.colour and is_held_out(meant.shape, meant.colour))
