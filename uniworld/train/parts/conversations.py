"""Conversations about scenes as the VLM of `tiny` learns them, and which of their tokens are answers.

Letters: B conversations, L tokens of the longest.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uniworld.data.scenes.questions import Question, converse
from uniworld.data.scenes.tasks import Item
from uniworld.data.scenes.wording import wording
from uniworld.models.prompts import DATA_ROLES, IMAGE, IMAGE_MARK, TURN_END, TURN_START, TokenIds
from uniworld.train.parts.words import caption

NUM_QUESTIONS = 3  # about a picture: to see it costs as much as several of them
IGNORED = -100
Conversation = list[dict[str, str]]


def answered(item: Item) -> Conversation:
    """Questions about a picture, answered; else the instruction, and in the place of the wanted picture its caption in
    the language of the instruction."""
    if item.task == "understanding":
        return talk_of(questions_about(item))
    return [*item.conversations[:-1], {"from": "gpt", "value": caption(item)}]


def questions_about(item: Item) -> tuple[Question, ...]:
    """NUM_QUESTIONS or fewer about the picture of an item of task "understanding"."""
    words = wording(item.language, np.random.default_rng((item.seed, NUM_QUESTIONS)))
    return converse(item.scenes[0], words, item.split, NUM_QUESTIONS) or item.facts


def talk_of(questions: Sequence[Question]) -> Conversation:
    """Questions about one picture, answered. It stands behind the last of them, as the engine shows it to a model whose
    `images_last` is true."""
    turns = []
    for question in questions:
        mark = IMAGE_MARK if question is questions[-1] else ""
        turns += [{"from": "human", "value": question.text + mark}, {"from": "gpt", "value": question.answer}]
    return turns


def conversation_text(turns: Conversation) -> str:
    """All turns, ended."""
    texts = ((DATA_ROLES[turn["from"]], turn["value"].replace(IMAGE_MARK, IMAGE)) for turn in turns)
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in texts)


def answer_labels(input_ids: Tensor, attention_mask: Tensor, tokens: TokenIds) -> Tensor:
    """[B, L]: the tokens of the last answer of each, with the <|im_end|> that ends it, IGNORED elsewhere. What was
    answered before came before the picture."""
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist())):
        said = ids[: sum(mask)]
        starts = [i for i in range(1, len(said)) if said[i] == tokens.assistant and said[i - 1] == tokens.turn_start]
        if starts:
            begin = starts[-1] + 2  # past the name and the line's end
            end = said.index(tokens.turn_end, begin) + 1
            labels[row, begin:end] = input_ids[row, begin:end]
    return labels


def answer_starts(labels: Tensor) -> Tensor:
    """bool [B, L]: the first token of every answer."""
    learned = labels != IGNORED
    return learned & ~F.pad(learned, (1, -1))


def answer_weights(labels: Tensor) -> Tensor:
    """fp32 [B, L], of sum 1: an answer of n tokens counts sqrt(n), so that captions do not drown answers of one word.

    Source: Chen et al., 2024, InternVL 2.5, section 3.3, "square averaging".
    """
    learned = labels != IGNORED
    answer = (answer_starts(labels).flatten().cumsum(0) * learned.flatten()).to(torch.int64)  # 0 outside of answers
    lengths = torch.bincount(answer)
    weights = torch.where(answer > 0, lengths[answer].float().rsqrt(), 0.0)
    return (weights / weights.sum()).view_as(labels)
