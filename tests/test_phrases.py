"""Which words of a question stand for what it speaks of (`uniworld/train/parts/phrases.py`)."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from uniworld.checkpoint import tiny
from uniworld.data.scenes.descriptions import EXTREMES, Description
from uniworld.data.scenes.graph import COLOURS, MATERIALS, SHAPES, SIZES
from uniworld.data.scenes.questions import KINDS, Question, ask
from uniworld.data.scenes.sampling import sample_scene
from uniworld.data.scenes.wording import wording
from uniworld.models.tokenizers import load_tokenizer
from uniworld.train.parts.conversations import conversation_text, talk_of
from uniworld.train.parts.phrases import PhraseHead, looking_loss, phrase_labels


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny.PACKAGED, "Qwen2Tokenizer")


def left_of(text, *phrases):
    about = Description(shape="ball", colour="red"), Description(shape="cube", extreme="left")
    return Question(kind="relation", text=text, answer="yes", about=about, phrases=phrases, relation="left of")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_spans_are_the_words_of_each_description(tokenizer, language):
    """Read back, for all kinds of questions, some behind others that have the same words."""
    found = dict.fromkeys(KINDS, 0)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        words, scene = wording(language, rng), sample_scene(rng, split="train")
        questions = [q for q in (ask(kind, scene, words, "train") for kind in KINDS) if q is not None]
        for question in questions:
            text = conversation_text(talk_of([question, question] if seed % 2 else [question]))
            labels = phrase_labels(tokenizer, [text], [question])
            ids = tokenizer(text, add_special_tokens=False).input_ids
            begins = labels["span"][0, :, 0].tolist()
            assert all(begin > (len(ids) / 2 - 12 if seed % 2 else 0) for begin in begins[: len(question.about)])
            for (begin, end), phrase in zip(labels["span"][0].tolist(), question.phrases):
                covered, inner = (tokenizer.decode(ids[b:e]).lower() for b, e in ((begin, end), (begin + 1, end - 1)))
                # A token of Chinese may go beyond a word, or hold a part of a character.
                assert phrase.lower() in covered and inner.strip("\ufffd") in phrase.lower(), (text, phrase)
                assert language == "zh" or covered.strip() == phrase.lower()
            assert not labels["span"][0, len(question.about) :].any()
            assert not labels["said"][0, len(question.about) :].any()
            found[question.kind] += len(question.phrases)
    assert found.pop("relation") > 30 and found.pop("count") == 40
    assert [kind for kind, number in found.items() if not number] == ["background", "style", "caption", "caption long"]


def test_what_is_said_are_the_attributes_of_a_description(tokenizer):
    question = left_of("Is the red ball left of the leftmost cube?", "the red ball", "the leftmost cube")
    said = phrase_labels(tokenizer, [conversation_text(talk_of([question]))], [question])["said"][0].tolist()
    ball, red = 1 + SHAPES.index("ball"), 1 + list(COLOURS).index("red")
    assert said == [[ball, red, 0, 0, 0], [1 + SHAPES.index("cube"), 0, 0, 0, 1 + list(EXTREMES).index("left")]]


def test_what_is_named_second_may_stand_first(tokenizer):
    question = left_of("From the leftmost cube, is the red ball to the left?", "the red ball", "the leftmost cube")
    text = conversation_text(talk_of([question]))
    (first, second), ids = phrase_labels(tokenizer, [text], [question])["span"][0].tolist(), tokenizer(text).input_ids
    assert second[1] < first[0] and tokenizer.decode(ids[slice(*second)]).strip() == "the leftmost cube"


def test_the_loss_is_of_all_words_and_of_the_ends_of_phrases():
    """Against torch's losses, one by one, in fp64."""
    torch.manual_seed(0)
    head, states = PhraseHead(16).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    span = torch.tensor([[[1, 4], [5, 7]], [[2, 3], [0, 0]]])
    said = torch.stack([torch.randint(0, size, (2, 2)) for size in head.sizes[1:]], dim=-1)
    loss, logged = head(states, {"span": span, "said": said})
    read = head.words(F.layer_norm(states, (16,))).float()
    phrase = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]])
    weights = torch.where(phrase == 0, 0.2, 1.0)
    errors = F.cross_entropy(read[..., :3].flatten(0, 1), phrase.flatten(), reduction="none").view(2, 9)
    expected, start = float((weights * errors).sum().detach() / weights.sum()), 3
    for i, names in enumerate((SHAPES, COLOURS, MATERIALS, SIZES, EXTREMES)):
        columns = slice(start, start + 1 + len(names))
        ends = [(0, 3, 0), (0, 6, 1), (1, 2, 0)]
        of_ends = [F.cross_entropy(read[row, at, columns], said[row, role, i]).detach() for row, at, role in ends]
        expected += 0.3 * float(torch.stack(of_ends).mean())
        start = columns.stop
    assert start == read.shape[-1] and float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    told = (read[0, 5:7, :3].argmax(-1) == 2).double().mean()
    assert float(logged["second_phrase_told"]) == pytest.approx(float(told))


def test_it_reads_what_states_hold():
    torch.manual_seed(0)
    head, states = PhraseHead(32), torch.randn(3, 8, 32)
    labels = {
        "span": torch.tensor([[[1, 3], [4, 6]], [[2, 4], [0, 0]], [[0, 0], [0, 0]]]),
        "said": torch.randint(0, 5, (3, 2, 5)),
    }
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    first = float(head(states, labels)[0].detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss, logged = head(states, labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 * first and logged["second_phrase_told"] == 1
    without = head(states, labels | {"span": torch.zeros(3, 2, 2, dtype=torch.int64)})
    assert without[0].isfinite() and without[1] == {}


def test_looking_is_the_share_of_attention_where_it_is_told_to():
    """Of two questions with two phrases, in one of which the second stands first, and one with one phrase."""
    torch.manual_seed(0)
    words, pictures = (torch.randn(3, 7, 7, requires_grad=True) for _ in range(2))
    sees = torch.ones(3, 7, 7, dtype=torch.bool).tril()
    sees[1, :, 0] = False
    sees[1, 0, 0] = True
    of_pictures = torch.zeros(3, 7, dtype=torch.bool)
    of_pictures[:, 5:] = True
    span = torch.tensor([[[0, 2], [3, 4]], [[3, 5], [1, 3]], [[1, 2], [0, 0]]])
    loss = looking_loss((words, pictures), sees, of_pictures, {"span": span})

    def share(scores, row, query, key):
        weights = [float(scores[row, query, k].detach().exp()) * bool(sees[row, query, k]) for k in range(7)]
        return weights[key] / sum(weights)

    ends = [(0, 3, 1), (1, 4, 2)]  # the later of the two ends, and the earlier
    seconds = [(0, 5, 3), (0, 6, 3), (1, 5, 2), (1, 6, 2)]
    expected = [-np.mean([np.log(share(s, *at)) for at in of]) for s, of in ((words, ends), (pictures, seconds))]
    assert float(loss.detach()) == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    assert words.grad.isfinite().all() and not words.grad[2].any() and pictures.grad[0, 5].any()
    none = looking_loss((words, pictures), sees, of_pictures, {"span": span * torch.tensor([1, 0])[:, None]})
    assert float(none.detach()) == 0
