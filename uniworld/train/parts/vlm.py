"""The vision-language model of `tiny`: questions about scenes, captions, and what an instruction is to lead to.

Answers are learned by next-token prediction; questions, instructions and pictures only condition. So that the states of
an instruction say what is to be drawn, its "answer" here is the caption of the wanted picture.

Letters: B conversations, L tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.names import VLM, authors_names
from uniworld.checkpoint.save import copy_side_files, save_module, write_json
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.models.prompts import (
    DATA_ROLES,
    IMAGE,
    IMAGE_MARK,
    TURN_END,
    TURN_START,
    PromptProcessor,
    TokenIds,
    VLMInputs,
    instruction,
)
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.sizes import PREPROCESSOR, qwen_config
from uniworld.train.parts.words import caption, open_tokenizers, read_ids

# Of five items three are questions; the others are what pictures are drawn from.
TASKS = ("understanding", "edit", "understanding", "understanding", "t2i")
IGNORED = -100
SCORED_AT_ONCE = 32
Conversation = list[dict[str, str]]


class VisionLanguage:
    """The part `vlm`: Qwen2.5-VL in the sizes of `sizes.qwen_config`."""

    not_for_making = ("module", "vlm")

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        words = open_tokenizers(config.words)
        tokenizer = load_tokenizer(words, "Qwen2Tokenizer")
        self.processor = PromptProcessor(tokenizer, VisionProcessor(PREPROCESSOR))
        self.vlm = VisionLanguageModel.from_config(qwen_config(read_ids(words, "qwen")))
        self.module: nn.Module = self.vlm.model.requires_grad_(True)

    def make(self, seeds: range) -> dict[str, Any]:
        """The fields of VLMInputs, and labels [B, L]: a token where it is part of an answer, else IGNORED."""
        items = [make_item(TASKS[s % len(TASKS)], s, "train", size_px=self.config.size_px) for s in seeds]
        return self._batch(items, [answered(item) for item in items])

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        logits, labels = self._predict(batch)
        right = (logits.detach().argmax(-1) == labels).float().mean()
        return F.cross_entropy(logits.float(), labels), {"tokens_right": right}

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Share of held-out questions answered exactly, of all and by kind; captions, which may be put otherwise, not.

        Every token of an answer is predicted after the right ones before it: all of them are right if and only if
        greedy decoding gives the answer.
        """
        size_px = self.config.size_px
        seeds = range(self.config.num_checked)
        asked = []
        for item in (make_item("understanding", seed, "held-out", size_px=size_px) for seed in seeds):
            for question in item.facts:
                if not question.kind.startswith("caption"):
                    turns = [
                        {"from": "human", "value": f"{IMAGE_MARK}\n{question.text}"},
                        {"from": "gpt", "value": question.answer},
                    ]
                    asked.append((question.kind, item, turns))
        found: dict[str, list[bool]] = {}
        for start in range(0, len(asked), SCORED_AT_ONCE):
            kinds, items, conversations = zip(*asked[start : start + SCORED_AT_ONCE])
            for kind, right in zip(kinds, self._right(self._batch(items, conversations))):
                found.setdefault(kind, []).append(right)
        by_kind = {f"accuracy_{kind}": float(np.mean(right)) for kind, right in sorted(found.items())}
        return {"accuracy": float(np.mean([r for right in found.values() for r in right])), **by_kind}

    def export(self, folder: Path) -> None:
        """A Qwen2.5-VL folder, whose tensors have the same names in the authors' layout; tokenizer, processor."""
        named = ((authors_names(VLM, name)[0], tensor) for name, tensor in self.module.named_parameters())
        words = open_tokenizers(self.config.words)
        save_module(folder, named, qwen_config(read_ids(words, "qwen")), dtype=STORED_DTYPE)
        copy_side_files(words, folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)

    def _batch(self, items: Sequence[Item], conversations: Sequence[Conversation]) -> dict[str, Any]:
        """Every other conversation has its pictures after the words, as at inference; the rest as in training data."""
        prompts = [conversation_text(turns, words_first=i % 2 == 0) for i, turns in enumerate(conversations)]
        # The wanted picture of an edit or a prompt is not shown.
        shown = [item.pictures[: prompt.count(IMAGE)] for item, prompt in zip(items, prompts)]
        inputs = self.processor.encode(prompts, [[Image.fromarray(p) for p in pictures] for pictures in shown])
        labels = answer_labels(inputs.input_ids, inputs.attention_mask, self.processor.tokens)
        return {f.name: getattr(inputs, f.name) for f in fields(inputs)} | {"labels": labels}

    def _predict(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and labels [n] of the answers' tokens."""
        inputs = VLMInputs(**{name: value for name, value in batch.items() if name != "labels"})
        labels = batch["labels"][:, 1:].to(self.vlm.device)
        learned = labels != IGNORED
        states = self.vlm.states(inputs).hidden_states[:, :-1][learned]
        return self.module.lm_head(states), labels[learned]

    def _right(self, batch: dict[str, Any]) -> list[bool]:
        """Of each conversation, whether all its answers' tokens are right."""
        logits, labels = self._predict(batch)
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = rows[(logits.argmax(-1) != labels).cpu()]
        return [row not in wrong.tolist() for row in range(len(batch["labels"]))]


def answered(item: Item) -> Conversation:
    """The conversation of an item; in the place of a picture its caption in the language of the instruction."""
    if item.task == "understanding":
        return item.conversations
    return [*item.conversations[:-1], {"from": "gpt", "value": caption(item)}]


def conversation_text(turns: Conversation, words_first: bool) -> str:
    """All turns, ended; the pictures before or after the words of their turn."""
    parts = []
    for turn in turns:
        marks, words = IMAGE * turn["value"].count(IMAGE_MARK), instruction(turn["value"])
        text = words + marks if words_first or not marks else f"{marks}\n{words}"
        parts.append(f"{TURN_START}{DATA_ROLES[turn['from']]}\n{text}{TURN_END}\n")
    return "".join(parts)


def answer_labels(input_ids: Tensor, attention_mask: Tensor, tokens: TokenIds) -> Tensor:
    """[B, L]: the tokens of answers with the <|im_end|> that ends them, IGNORED elsewhere."""
    labels = torch.full_like(input_ids, IGNORED)
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist())):
        column, length = 0, sum(mask)
        while column < length:
            starts = ids[column] == tokens.assistant and ids[column - 1] == tokens.turn_start
            column += 2 if starts else 1  # past the name and the line's end
            if starts:
                end = ids.index(tokens.turn_end, column) + 1
                labels[row, column:end] = input_ids[row, column:end]
                column = end
    return labels
