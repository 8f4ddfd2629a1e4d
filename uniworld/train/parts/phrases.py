"""Which words of a question stand for the things that it speaks of, and what they say.

A picture's tokens find "the red ball" by the words before them. From answers, and from being told which things are
spoken of, they learned that for the first thing of a question and not for the second, with which it is compared: no
state said of a word that it belongs to the second phrase, and the last word of a phrase did not know its first. So
linear layers read both from the states of the words after the first layers of the language model, and are thrown away;
and two heads are told where to look: from the end of the second phrase at the end of the first, and from the tokens of
the picture at the end of the second. The scene graph's descriptions say what is to be read.

Letters: N questions, L tokens, D width of a state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.data.scenes.descriptions import EXTREMES, Description
from uniworld.data.scenes.questions import Question
from uniworld.train.parts.dense import OF_A_THING

MAX_PHRASES = 2
SAID = {**OF_A_THING, "extreme": tuple(EXTREMES)}  # what a description may say; class 0 is nothing
NO_PHRASE_WEIGHT = 0.2  # of words that are in none, which are most
SAID_WEIGHT = 0.3


def phrase_labels(tokenizer: Any, texts: Sequence[str], questions: Sequence[Question]) -> dict[str, Tensor]:
    """span int64 [N, 2, 2]: the tokens of the words of each description, from the first to behind the last, 0 to 0
    where there is none. said int64 [N, 2, 5]: the classes of SAID.

    tokenizer: a fast one of transformers. texts: conversations that end with the questions, whose pictures stand behind
    them.
    """
    span = torch.zeros(len(texts), MAX_PHRASES, 2, dtype=torch.int64)
    said = torch.zeros(len(texts), MAX_PHRASES, len(SAID), dtype=torch.int64)
    for row, (text, question) in enumerate(zip(texts, questions, strict=True)):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        at = text.rindex(question.text)
        for role, (phrase, description) in enumerate(zip(question.phrases, question.about)):
            at = _find(phrase, text, at)
            covered = [i for i, (begin, end) in enumerate(offsets) if begin < at + len(phrase) and at < end]
            span[row, role] = torch.tensor([covered[0], covered[-1] + 1])
            said[row, role] = torch.tensor(_classes(description))
    return {"span": span, "said": said}


def _find(phrase: str, text: str, start: int) -> int:
    """Where it begins, which may be with a capital letter, and in some languages before what is named first."""
    lower = text.lower()
    found = lower.find(phrase.lower(), start)
    return found if found >= 0 else lower.rindex(phrase.lower(), 0, start)


def _classes(description: Description) -> list[int]:
    said = {name: getattr(description, name) for name in SAID}
    return [0 if said[name] is None else 1 + list(names).index(said[name]) for name, names in SAID.items()]


class PhraseHead(nn.Module):
    """Reads `phrase_labels` from states [N, L, D] of words."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = (1 + MAX_PHRASES, *(1 + len(names) for names in SAID.values()))
        self.norm = nn.LayerNorm(dim)
        self.words = nn.Linear(dim, sum(self.sizes))

    def forward(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: the cross-entropies of which phrase a word belongs to, and of what the last words of phrases say of
        each attribute. And what to log: of the words of second phrases how many are told."""
        span, said = (labels[name].to(states.device) for name in ("span", "said"))
        phrase, *attributes = self.words(self.norm(states)).float().split(self.sizes, dim=-1)
        column = torch.arange(states.shape[1], device=states.device)
        within = (span[..., :1] <= column) & (column < span[..., 1:])  # [N, 2, L]
        wanted = (within * torch.arange(1, 1 + MAX_PHRASES, device=states.device)[:, None]).amax(1)
        weight = torch.tensor([NO_PHRASE_WEIGHT] + [1.0] * MAX_PHRASES, device=states.device)
        loss = F.cross_entropy(phrase.flatten(0, 1), wanted.flatten(), weight=weight)
        row, role = (span[..., 1] > 0).nonzero(as_tuple=True)
        if len(row):
            last = span[row, role, 1] - 1
            errors = [F.cross_entropy(a[row, last], said[row, role, i]) for i, a in enumerate(attributes)]
            loss = loss + SAID_WEIGHT * torch.stack(errors).sum()
        second = wanted == MAX_PHRASES
        told = {"second_phrase_told": (phrase.detach().argmax(-1) == wanted)[second].float().mean()}
        return loss, told if second.any() else {}


def looking_loss(
    scores: Sequence[Tensor], sees: Tensor, of_pictures: Tensor, labels: dict[str, Tensor]
) -> Tensor:
    """How little one head of each of two layers looks where it is told to, of questions with two phrases: in the first
    layer the end of the second phrase at the end of the first, in the second layer a picture's tokens at the end of the
    second. The mean negative logarithms of what is looked at, summed; 0 where no question has two.

    scores: fp32 [N, L, L] of each layer, before the softmax. sees: bool [N, L, L]. of_pictures: bool [N, L].
    """
    span = labels["span"].to(sees.device)
    two = (span[..., 1] > 0).all(1).nonzero()[:, 0]
    if not len(two):
        return scores[0].new_zeros(())
    first, second = (span[two, :, 1] - 1).unbind(-1)
    later, earlier = torch.maximum(first, second), torch.minimum(first, second)
    row, token = of_pictures[two].nonzero(as_tuple=True)
    losses = [
        F.cross_entropy(of_layer[n, query].masked_fill(~sees[n, query], -torch.inf), at)
        for of_layer, n, query, at in zip(scores, (two, two[row]), (later, token), (earlier, second[row]))
    ]
    return torch.stack(losses).sum()
