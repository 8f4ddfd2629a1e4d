"""The vision-language model of `tiny`: questions about scenes, captions, and what an instruction is to lead to.

First it learns to see (`dense`) and to point at what is described (`grounding`): a language model that finds nothing in
a picture learns to guess. Then answers are learned by next-token prediction; questions, instructions and pictures only
condition. So that the states of an instruction say what is to be drawn, its "answer" here is the caption of the wanted
picture; and the states of the tokens of its picture, which stands behind the words, must say what is to be at each
place of the wanted one. In the same way the states of a question's picture must say which things it speaks of.

Letters: B conversations, L tokens of the longest, V vocabulary, n tokens of answers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.names import TOWER_PREFIX, VLM, authors_names
from uniworld.checkpoint.save import copy_side_files, save_module, write_json
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.weights import Plan, fill, module_targets, read_headers
from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.questions import Question, converse
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.data.scenes.wording import wording
from uniworld.models.prompts import (
    DATA_ROLES,
    IMAGE,
    IMAGE_MARK,
    TURN_END,
    TURN_START,
    PromptProcessor,
    TokenIds,
    VLMInputs,
)
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.models.vlm import VisionLanguageModel, rope_index
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.dense import DenseHead, PlaceHead, changed_points, dense_labels
from uniworld.train.parts.grounding import GroundingHead, asked_labels, changed_labels, descriptions
from uniworld.train.parts.sizes import PREPROCESSOR, VLM_PX, qwen_config
from uniworld.train.parts.words import caption, open_tokenizers, read_ids

# Of five items three are questions; the others are what pictures are drawn from.
TASKS = ("understanding", "edit", "understanding", "understanding", "t2i")
PLANNED_TASKS = ("edit",)  # whose wanted pictures are planned without a word about them
SEEN_TASKS = ("understanding", "edit", "t2i")  # whose pictures the vision tower learns to see
NUM_QUESTIONS = 3  # about a picture: to see it costs as much as several of them
POINTS_PER_SIDE = 4  # of a token of a picture
TOKENS_PER_SIDE = math.isqrt(VLM_PX) // (PREPROCESSOR["patch_size"] * PREPROCESSOR["merge_size"])
NUM_TOKENS, NUM_POINTS = TOKENS_PER_SIDE**2, TOKENS_PER_SIDE * POINTS_PER_SIDE  # of a picture, and along its side
DENSE_WEIGHT = 0.2  # once answers are learned
PLAN_WEIGHT = 1.0  # where they are not
GROUNDING_WEIGHT, POINTING_WEIGHT = 0.3, 1.0  # beside answers, and before
PLACE_WEIGHT = 0.5
NUM_DESCRIPTIONS = 6  # of each picture that is looked at
# Batches in turn, first of pictures alone and then with conversations: from these alone pointing is forgotten.
FIRST_TURNS, LATER_TURNS = ("look", "plan"), ("converse", "look", "converse", "plan")
GROUNDED_LAYERS = (1, 2)  # of the language model: after them, counted from 0, is read which things are spoken of
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
        if config.start is None:
            self.vlm = VisionLanguageModel.from_config(qwen_config(read_ids(words, "qwen")))
        else:
            self.vlm = load_vlm(Path(config.start))
        heads: dict[str, nn.Module] = {n: DenseHead(self.vlm.hidden_size, POINTS_PER_SIDE) for n in ("dense", "wanted")}
        self._at_layer: dict[int, Tensor] = {}
        for index in GROUNDED_LAYERS:
            heads[f"grounding{index}"] = GroundingHead(self.vlm.hidden_size, POINTS_PER_SIDE)
            self.vlm.model.model.language_model.layers[index].register_forward_hook(self._keep_layer(index))
        heads["place"] = PlaceHead(self.vlm.hidden_size, NUM_TOKENS)
        self.module: nn.Module = nn.ModuleDict({"vlm": self.vlm.model.requires_grad_(True), **heads})
        self.vlm.model.model.visual.register_forward_hook(self._keep_seen)

    def make(self, seeds: range) -> dict[str, Any]:
        """Of the first `look_items` items pictures and descriptions, and edits without words about their outcome; then
        conversations, and such again, in turn.

        The fields of VLMInputs, but those of words; seen: the labels of `dense` for the pictures; and with words
        wanted, the same for the pictures that are asked for, and their `changed_points`; asked, of `asked_labels`; and
        labels [B, L]: a token where it is part of an answer, else IGNORED.
        """
        turns = FIRST_TURNS if seeds.start < self.config.first_item + self.config.look_items else LATER_TURNS
        turn = turns[seeds.start // len(seeds) % len(turns)]
        tasks = {"look": SEEN_TASKS, "plan": PLANNED_TASKS, "converse": TASKS}[turn]
        items = [make_item(tasks[s % len(tasks)], s, size_px=self.config.size_px) for s in seeds]
        if turn == "look":
            pixels, grids = self.processor.vision([Image.fromarray(item.pictures[-1]) for item in items])
            pictures = {"pixel_values": pixels, "image_grid_thw": grids}
            return pictures | {"seen": self._dense([item.scenes[-1] for item in items])} | self._pointed(items)
        if turn == "plan":
            return self._batch(items, [item.conversations[:-1] for item in items])
        first = [questions_about(item)[0] if item.task == "understanding" else None for item in items]
        return self._batch(items, [answered(item) for item in items], first)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        if "labels" not in batch:
            return self._look(batch)
        states = self._states(batch)
        planning, pointing, loss, more = PLAN_WEIGHT, POINTING_WEIGHT, states.new_zeros(()), {}
        if (batch["labels"] != IGNORED).any():
            planning, pointing, (loss, more) = DENSE_WEIGHT, GROUNDING_WEIGHT, self._answer(states, batch)
        if "seen" not in batch:
            return loss, more
        dense, seen = self._read("dense", self._seen, batch["seen"])
        of_pictures = batch["input_ids"].to(states.device) == self.processor.tokens.image_pad
        plan, wanted = self._read("wanted", states[of_pictures], batch["wanted"])
        more |= seen | {f"wanted_{name}": value for name, value in wanted.items()}
        # The DiT gives these states no position: they have to tell themselves where it is to be.
        place, more["final_place_right"] = self.module["place"](states[of_pictures].unflatten(0, (-1, NUM_TOKENS)))
        grounding, found = self._read_asked(of_pictures, batch["asked"].to(states.device))
        loss = loss + planning * (dense + plan) + PLACE_WEIGHT * place + pointing * grounding
        return loss, more | found

    def _answer(self, states: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        logits, labels, weights = self._predict(states, batch)
        right = (logits.detach().argmax(-1) == labels).float().mean()
        answers = (weights * F.cross_entropy(logits.float(), labels, reduction="none")).sum()
        return answers, {"answers": answers.detach(), "tokens_right": right}

    def _pointed(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """input_ids and attention_mask [N, L] of descriptions, each with its picture behind it; row int64 [N], which
        picture that is; asked, of `asked_labels`."""
        ids, rows, pairs = [], [], []
        for row, item in enumerate(items):
            words = wording(item.language, np.random.default_rng((item.seed, NUM_DESCRIPTIONS)))
            for described in descriptions(item.scenes[-1], words, NUM_DESCRIPTIONS):
                turn = self.processor.tokenize(f"{TURN_START}user\n{described.text}{IMAGE}")
                pad = self.processor.tokens.image_pad
                ids.append([token for token in turn for _ in range(NUM_TOKENS if token == pad else 1)])
                rows.append(row)
                pairs.append((item.scenes[-1], described))
        if not ids:
            return {}
        input_ids, attention_mask = self.processor.pad(ids)
        asked = asked_labels(pairs, NUM_POINTS)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "row": torch.tensor(rows), "asked": asked}

    def _look(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The tower sees each picture once; the language model reads every description of it."""
        device, visual = self.vlm.device, self.vlm.model.model.visual
        visual(batch["pixel_values"].to(device), grid_thw=batch["image_grid_thw"].to(device))
        dense, seen = self._read("dense", self._seen, batch["seen"])
        if "row" not in batch:
            return dense, seen
        language = self.vlm.model.model.language_model
        ids, mask, row = batch["input_ids"], batch["attention_mask"], batch["row"]
        of_pictures = ids == self.processor.tokens.image_pad
        grids = batch["image_grid_thw"][row]
        positions, _ = rope_index(of_pictures.long(), mask, grids, self.vlm.merge_size)
        states = self._seen.unflatten(0, (len(batch["image_grid_thw"]), -1))[row.to(device)]
        embeddings = language.embed_tokens(ids.to(device))
        embeddings = embeddings.masked_scatter(of_pictures[..., None].to(device), states.to(embeddings.dtype))
        language(inputs_embeds=embeddings, position_ids=positions.to(device), use_cache=False)
        grounding, told = self._read_asked(of_pictures.to(device), batch["asked"].to(device))
        return dense + POINTING_WEIGHT * grounding, seen | told

    def _keep_seen(self, visual: nn.Module, inputs: Any, output: Any) -> None:
        """The states of the pictures' tokens [all, D], which transformers 4 returns bare."""
        self._seen = getattr(output, "pooler_output", output)

    def _keep_layer(self, index: int) -> Callable[..., None]:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._at_layer[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    def _read_asked(self, of_pictures: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """After all GROUNDED_LAYERS the loss of which things are meant and of where a token is; and what is told after
        the last."""
        losses, told = [], {}
        for index in GROUNDED_LAYERS:
            states = self._at_layer[index][of_pictures].unflatten(0, (len(labels), -1))
            loss, told = self.module[f"grounding{index}"](states, labels)
            place, right = self.module["place"](states)
            losses += [loss, PLACE_WEIGHT * place]
        return torch.stack(losses).sum(), told | {"place_right": right}

    def _read(self, head: str, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """What a head reads from the states of the pictures' tokens [all, D]."""
        labels = {name: label.to(self.vlm.device) for name, label in labels.items()}
        return self.module[head](states.unflatten(0, (len(labels["whole"]), -1)), labels)

    def _dense(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        return dense_labels(scenes, NUM_POINTS)

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
                    asked.append((question.kind, item, turns_of(question, with_picture=True)))
        found: dict[str, list[bool]] = {}
        for start in range(0, len(asked), SCORED_AT_ONCE):
            kinds, items, conversations = zip(*asked[start : start + SCORED_AT_ONCE])
            for kind, right in zip(kinds, self._right(self._batch(items, conversations))):
                found.setdefault(kind, []).append(right)
        by_kind = {f"accuracy_{kind}": float(np.mean(right)) for kind, right in sorted(found.items())}
        return {"accuracy": float(np.mean([r for right in found.values() for r in right])), **by_kind}

    def export(self, folder: Path) -> None:
        """A Qwen2.5-VL folder, whose tensors have the same names in the authors' layout; tokenizer, processor."""
        named = ((authors_names(VLM, name)[0], tensor) for name, tensor in self.vlm.model.named_parameters())
        words = open_tokenizers(self.config.words)
        save_module(folder, named, qwen_config(read_ids(words, "qwen")), dtype=STORED_DTYPE)
        copy_side_files(words, folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)

    def _batch(
        self,
        items: Sequence[Item],
        conversations: Sequence[Conversation],
        first: Sequence[Question | None] | None = None,
    ) -> dict[str, Any]:
        """first: the question, if any, that stands before the picture of each conversation."""
        prompts = [conversation_text(turns) for turns in conversations]
        # The wanted picture of an edit or a prompt is not shown.
        shown = [item.pictures[: prompt.count(IMAGE)] for item, prompt in zip(items, prompts)]
        inputs = self.processor.encode(prompts, [[Image.fromarray(p) for p in pictures] for pictures in shown])
        labels = answer_labels(inputs.input_ids, inputs.attention_mask, self.processor.tokens)
        of_words = {f.name: getattr(inputs, f.name) for f in fields(inputs)} | {"labels": labels}
        seen = [scene for item, some in zip(items, shown) for scene in item.scenes[: len(some)]]
        if not seen:
            return of_words
        wanted = [item.scenes[-1] for item, some in zip(items, shown) for _ in some]
        asked = [question for question, some in zip(first or [None] * len(items), shown) for _ in some]
        roles = asked_labels(list(zip(seen, asked)), NUM_POINTS)
        before, after = self._dense(seen), self._dense(wanted)
        after["changed"] = changed = changed_points(before["points"], after["points"])
        edited = changed.any((1, 2))
        roles[edited, ..., 0] = changed_labels(before["points"], changed)[edited]
        return of_words | {"seen": before, "wanted": after, "asked": roles}

    def _states(self, batch: dict[str, Any]) -> Tensor:
        """[B, L, D]"""
        inputs = VLMInputs(**{field.name: batch[field.name] for field in fields(VLMInputs)})
        return self.vlm.states(inputs).hidden_states

    def _predict(self, states: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V], labels [n] and weights [n] of the answers' tokens."""
        labels = batch["labels"].to(self.vlm.device)
        weights = answer_weights(labels)[:, 1:]
        labels = labels[:, 1:]
        learned = labels != IGNORED
        return self.vlm.model.lm_head(states[:, :-1][learned]), labels[learned], weights[learned]

    def _right(self, batch: dict[str, Any]) -> list[bool]:
        """Of each conversation, whether all its answers' tokens are right."""
        logits, labels, _ = self._predict(self._states(batch), batch)
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = rows[(logits.argmax(-1) != labels).cpu()]
        return [row not in wrong.tolist() for row in range(len(batch["labels"]))]


def load_vlm(folder: Path) -> VisionLanguageModel:
    """The trained VLM, fp32 and frozen, of a folder that holds it alone or with a DiT.

    Raises: FileNotFoundError where it is not there.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no VLM; train one first (configs/tiny/vlm.yaml)")
    vlm = VisionLanguageModel.from_config(read_config(folder))
    targets = module_targets(vlm.model, lambda name: authors_names(VLM, name))
    headers = read_headers(weight_files(folder))
    own = {name: header for name, header in headers.items() if not name.startswith(TOWER_PREFIX)}
    plan = Plan(folder, own, targets, torch.device("cpu"), torch.float32)
    plan.check()
    fill([plan])
    return vlm


def answered(item: Item) -> Conversation:
    """Questions about a picture, answered; else the instruction, and in the place of the wanted picture its caption in
    the language of the instruction."""
    if item.task == "understanding":
        questions = enumerate(questions_about(item))
        return [turn for number, question in questions for turn in turns_of(question, number == 0)]
    return [*item.conversations[:-1], {"from": "gpt", "value": caption(item)}]


def questions_about(item: Item) -> tuple[Question, ...]:
    """NUM_QUESTIONS or fewer about the picture of an item of task "understanding"."""
    words = wording(item.language, np.random.default_rng((item.seed, NUM_QUESTIONS)))
    return converse(item.scenes[0], words, item.split, NUM_QUESTIONS) or item.facts


def turns_of(question: Question, with_picture: bool) -> Conversation:
    mark = IMAGE_MARK if with_picture else ""
    return [{"from": "human", "value": question.text + mark}, {"from": "gpt", "value": question.answer}]


def conversation_text(turns: Conversation) -> str:
    """All turns, ended."""
    texts = ((DATA_ROLES[turn["from"]], turn["value"].replace(IMAGE_MARK, IMAGE)) for turn in turns)
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in texts)


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


def answer_weights(labels: Tensor) -> Tensor:
    """fp32 [B, L], of sum 1: an answer of n tokens counts sqrt(n), so that captions do not drown answers of one word.

    Source: Chen et al., 2024, InternVL 2.5, section 3.3, "square averaging".
    """
    learned = labels != IGNORED
    starts = learned & ~F.pad(learned, (1, -1))
    answer = (starts.flatten().cumsum(0) * learned.flatten()).to(torch.int64)  # 0 outside of answers
    lengths = torch.bincount(answer)
    weights = torch.where(answer > 0, lengths[answer].float().rsqrt(), 0.0)
    return (weights / weights.sum()).view_as(labels)
