"""The words that would say what training never shows: they take no part where answers are learned, as in `dense`.

A language model that never reads "blue cube" learns that behind "blue" no "cube" comes, and never answers so.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from uniworld.data.scenes.graph import Scene, Thing
from uniworld.data.scenes.questions import Question
from uniworld.data.scenes.wording import LANGUAGES, Wording, wording
from uniworld.train.parts.conversations import IGNORED
from uniworld.train.parts.dense import UNSEEN_PAIRS

ONE_OF_TWO = ("what_at", "bigger", "smaller")  # questions whose answer is a thing's colour and shape


def unseen_answers(question: Question, scene: Scene, words: Wording) -> tuple[str, ...]:
    """What would answer a question if the thing that it asks for were of an unseen pair of its shape or colour."""
    if question.kind in ("shape", "colour"):
        thing = scene.things[question.about[0].matches(scene)[0]]
        shape, colour = thing.shape, thing.colour
    elif question.kind in ONE_OF_TWO:
        colour, shape = question.value.split()
    else:
        return ()
    if question.kind == "shape":
        return tuple(words.shape(other) for other, beside in UNSEEN_PAIRS if beside == colour)
    if question.kind == "colour":
        return tuple(words.canonical("COLOURS", other) for beside, other in UNSEEN_PAIRS if beside == shape)
    return tuple(words.name(Thing(shape=s, colour=c)) for s, c in UNSEEN_PAIRS if s == shape or c == colour)


class UnseenWords:
    """Which tokens would say what training never shows.

    tokenize: the ids of a text.
    """

    def __init__(self, tokenize: Callable[[str], list[int]]):
        self.tokenize = tokenize
        self.after: dict[tuple[int, ...], set[int]] = {}
        for words in (wording(language, np.random.default_rng(0)) for language in LANGUAGES):
            for shape, colour in UNSEEN_PAIRS:
                for before, pair in _said(words, shape, colour):
                    ids = tokenize(pair)
                    for end in range(len(tokenize(before)), len(ids)):
                        self.after.setdefault(tuple(ids[:end]), set()).add(ids[end])
        self.lengths = sorted({len(before) for before in self.after})

    def find(self, labels: Tensor, unseen: Sequence[Sequence[str]] = ()) -> Tensor:
        """int64 [M, 2]: for tokens of answers, counted row by row, a token that takes no part there.

        labels: [N, L], of `conversations.answer_labels`. unseen: for every answer, row by row, its `unseen_answers`.
        """
        found: list[tuple[int, int]] = []
        number = count = 0
        for row in labels.tolist():
            begin = 0
            for column, token in enumerate(row):
                if token == IGNORED:
                    continue
                if row[column - 1] == IGNORED:
                    begin, number = column, number + 1
                    starts = [tuple(self.tokenize(text)) for text in unseen[number - 1]] if unseen else []
                said = tuple(row[begin:column])
                tokens = {ids[len(said)] for ids in starts if len(ids) > len(said) and ids[: len(said)] == said}
                for length in self.lengths:
                    tokens |= self.after.get(said[-length:], set()) if length <= len(said) else set()
                found += [(count, other) for other in sorted(tokens - {token})]
                count += 1
        return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def _said(words: Wording, shape: str, colour: str) -> list[tuple[str, str]]:
    """A colour, and the colour with a noun, in all their synonyms, at a text's start and in its middle."""
    names = words.words.SHAPES[shape]
    nouns = [noun for forms in names for noun in ((forms,) if isinstance(forms, str) else forms)]
    said = []
    for adjective in words.words.COLOURS[colour]:
        for noun in nouns:
            if words.spaced:
                said += [(start + adjective, f"{start}{adjective} {noun}") for start in ("", " ")]
            else:
                said += [(adjective + joint, f"{adjective}{joint}{noun}") for joint in ("", "的")]
    return said
