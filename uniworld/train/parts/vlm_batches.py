"""The batches that the VLM of `tiny` learns from: pictures with descriptions, edits to plan, and conversations.

Letters: B conversations, N short turns of a user, L tokens of the longest, P points along a picture's side.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniworld.data.scenes.edits import edits_of
from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.questions import COLOURLESS_STYLES, Question, ask, converse
from uniworld.data.scenes.tasks import Item, make_item
from uniworld.data.scenes.wording import Wording, wording
from uniworld.models.prompts import IMAGE, TURN_START, PromptProcessor
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.conversations import (
    Conversation,
    answer_labels,
    answered,
    conversation_text,
    questions_about,
    talk_of,
)
from uniworld.train.parts.dense import OF_A_THING, UNNAMED, changed_points, dense_labels
from uniworld.train.parts.grounding import NO_QUESTION, ROLES, asked_labels, changed_labels, descriptions
from uniworld.train.parts.known import known_labels
from uniworld.train.parts.phrases import phrase_labels
from uniworld.train.parts.recolour import UnseenShapes, greyed, recoloured, unseen_at_points, unseen_of_roles
from uniworld.train.parts.sizes import PREPROCESSOR, VLM_PX
from uniworld.train.parts.unseen_words import UnseenWords, unseen_answers

# Of five items three are questions; the others are what pictures are drawn from.
TASKS = ("understanding", "edit", "understanding", "understanding", "t2i")
ASKED_TASKS = ("understanding",)
SEEN_TASKS = ("understanding", "edit", "t2i")  # whose pictures the vision tower learns to see
# What items each batch has; plans are of wanted pictures, without a word about them.
TURN_TASKS = {
    "look": SEEN_TASKS,
    "plan": ("edit",),
    "converse": TASKS,
    "ask": ASKED_TASKS,
    "see": ASKED_TASKS,
}
POINTS_PER_SIDE = 4  # of a token of a picture
TOKENS_PER_SIDE = math.isqrt(VLM_PX) // (PREPROCESSOR["patch_size"] * PREPROCESSOR["merge_size"])
NUM_TOKENS, NUM_POINTS = TOKENS_PER_SIDE**2, TOKENS_PER_SIDE * POINTS_PER_SIDE  # of a picture, and along its side
# Of each picture that is looked at, that edits are planned of, that is asked about: to see it costs as much as several.
NUM_DESCRIPTIONS, NUM_EDITS, NUM_ASKED = 6, 5, 6
# Of these questions so many compare two things: the last to be learned, and a quarter of the questions of any kind.
NUM_COMPARING = 3
MAX_BEFORE = 3  # questions before the one that is asked
COMPARING = ("relation", "what_at", "bigger", "smaller", "is_bigger", "same_colour", "more")
# What can be asked of pictures in other colours; materials, whose lights change with brightness, can not.
COLOUR_BLIND = ("shape", "count", "where", "relation", "is_bigger", "more")
DRAWN_FOR_ONE = 3  # for every one that is kept: most name a colour
TRIES = 4  # for every such question: not every scene has things of each kind to compare
# Batches in turn, first of pictures alone and then with conversations: from these alone pointing is forgotten.
FIRST_TURNS = ("look", "plan")
LATER_TURNS = ("converse", "ask", "see", "ask", "plan", "ask", "look", "ask", "see", "ask")
UNSHOWN = [list(OF_A_THING).index(name) for name in ("colour", "material")]  # in other colours
Asked = tuple[Scene, Question]


class Batches:
    def __init__(self, config: PartConfig, processor: PromptProcessor):
        self.config, self.processor = config, processor
        self.unseen_words = UnseenWords(processor.tokenize)

    def make(self, seeds: range) -> dict[str, Any]:
        """Of the first `look_items` items pictures with descriptions, and edits to plan; then conversations and single
        questions as well, in turn.

        All have pixel_values and image_grid_thw, unless no picture is shown, and grey_values where it is shown in greys
        too; seen: the labels of `dense` for the pictures; and asked uint8 [N, P, P, 3], of `asked_labels`. Edits have
        wanted, labels as of seen for the pictures that are asked for, and their `changed_points`. Turns about a picture
        have input_ids and attention_mask [N, L], and row int64 [N], which picture it is; conversations have the fields
        of VLMInputs, and wanted. Both have labels [N, L] where there are answers: a token where it is part of one, else
        IGNORED; and unseen, of `UnseenWords`.
        Questions have known, of `known_labels`, and phrases, of `phrase_labels`.
        """
        turns = FIRST_TURNS if seeds.start < self.config.first_item + self.config.look_items else LATER_TURNS
        turn = turns[seeds.start // len(seeds) % len(turns)]
        tasks = TURN_TASKS[turn]
        items = [make_item(tasks[s % len(tasks)], s, size_px=self.config.size_px) for s in seeds]
        if turn == "look":
            return self._described(items)
        if turn == "see":
            return self._recoloured(items)
        if turn == "plan":
            return self._planned(items)
        if turn == "ask":
            return self._asked(items)
        asked = [questions_about(item)[-1] if item.task == "understanding" else None for item in items]
        batch = self.conversations(items, [answered(item) for item in items], asked)
        unseen = [_unseen(item, [q])[0] if q else () for item, q in zip(items, asked)]
        return batch | {"unseen": self.unseen_words.find(batch["labels"], unseen)}

    def _described(self, items: Sequence[Item]) -> dict[str, Any]:
        """Pictures, and descriptions of what may be in each."""
        scenes = [item.scenes[-1] for item in items]
        turns, pairs = [], []
        for row, (item, scene) in enumerate(zip(items, scenes)):
            words = wording(item.language, np.random.default_rng((item.seed, NUM_DESCRIPTIONS)))
            for described in descriptions(scene, words, NUM_DESCRIPTIONS):
                turns.append((row, _shown(described.text)))
                pairs.append((scene, described))
        batch = self._short_turns([item.pictures[-1] for item in items], turns) | {"seen": self._labels(scenes)}
        return batch | {"asked": asked_labels(pairs, NUM_POINTS)} if pairs else batch

    def _recoloured(self, items: Sequence[Item]) -> dict[str, Any]:
        """Pictures in other colours, which have no names, the same in greys, and of the questions about each those that
        name no colour."""
        scenes, pictures, greys, turns, pairs, answers = [item.scenes[0] for item in items], [], [], [], [], []
        unseen: list[UnseenShapes] = []
        for row, (item, scene) in enumerate(zip(items, scenes)):
            rng = np.random.default_rng((item.seed, NUM_ASKED))
            words, (picture, of_things) = wording(item.language, rng), recoloured(item.pictures[0], scene, rng)
            pictures.append(picture)
            greys.append(greyed(item.pictures[0], scene, rng))
            unseen.append(of_things)
            for (*_, question) in (talk for _ in range(DRAWN_FOR_ONE) for talk in _talks(scene, words, item.split)):
                if question.kind in COLOUR_BLIND and not any(described.colour for described in question.about):
                    turns.append((row, conversation_text(talk_of([question]))))
                    pairs.append((scene, question))
                    asked = of_things[question.about[0].matches(scene)[0]] if question.kind == "shape" else ()
                    answers.append(tuple(words.shape(shape) for shape in sorted(asked)))
        batch = self._short_turns(pictures, turns) | {"seen": self._labels(scenes)}
        batch["grey_values"], _ = self.processor.vision([Image.fromarray(grey) for grey in greys])
        del batch["seen"]["whole"]
        batch["seen"]["points"][..., UNSHOWN] = UNNAMED
        batch["seen"]["unseen_shapes"] = unseen_at_points(scenes, unseen, NUM_POINTS)
        if not pairs:
            return batch
        batch |= self._answers(batch, pairs, turns)
        batch["known"]["things"][..., UNSHOWN] = UNNAMED
        batch["known"]["unseen_shapes"] = unseen_of_roles(pairs, [unseen[row] for row, _ in turns])
        return batch | {"unseen": self.unseen_words.find(batch["labels"], answers)}

    def _planned(self, items: Sequence[Item]) -> dict[str, Any]:
        """Pictures, and edits of each, its item's and others, with what they lead to."""
        scenes, turns, afters = [item.scenes[0] for item in items], [], []
        for row, item in enumerate(items):
            words = wording(item.language, np.random.default_rng((item.seed, NUM_EDITS)))
            others = edits_of(scenes[row], words, NUM_EDITS - 1, split=item.split, language=item.language)
            turns += [(row, _shown(edit.instruction)) for edit in (item.facts, *others)]
            afters += [edit.after for edit in (item.facts, *others)]
        seen, wanted = self._labels(scenes), self._labels(afters)
        before = seen["points"][[row for row, _ in turns]]
        wanted["changed"] = changed_points(before, wanted["points"])
        roles = torch.full((*before.shape[:3], len(ROLES)), NO_QUESTION, dtype=torch.uint8)
        roles[..., 0] = changed_labels(before, wanted["changed"])
        pictures = self._short_turns([item.pictures[0] for item in items], turns)
        return pictures | {"seen": seen, "wanted": wanted, "asked": roles}

    def _asked(self, items: Sequence[Item]) -> dict[str, Any]:
        """Pictures, and questions about each, every one answered on its own, some behind earlier ones. No captions,
        which are long: conversations have them."""
        turns, pairs, unseen = [], [], []
        for row, item in enumerate(items):
            scene, words = item.scenes[0], wording(item.language, np.random.default_rng((item.seed, NUM_ASKED)))
            for talk in _talks(scene, words, item.split):
                turns.append((row, conversation_text(talk_of(talk))))
                pairs.append((scene, talk[-1]))
                unseen += _unseen(item, talk[-1:])
        batch = self._short_turns([item.pictures[0] for item in items], turns)
        batch["seen"] = self._labels([item.scenes[0] for item in items])
        if not pairs:
            return batch
        batch |= self._answers(batch, pairs, turns)
        return batch | {"unseen": self.unseen_words.find(batch["labels"], unseen)}

    def _answers(
        self, batch: dict[str, Any], pairs: Sequence[Asked], turns: Sequence[tuple[int, str]]
    ) -> dict[str, Any]:
        """What is to be learned of the question of every turn."""
        return {
            "labels": answer_labels(batch["input_ids"], batch["attention_mask"], self.processor.tokens),
            "asked": asked_labels(pairs, NUM_POINTS),
            "known": known_labels(pairs),
            "phrases": phrase_labels(self.processor.tokenizer, [t for _, t in turns], [q for _, q in pairs]),
        }

    def _short_turns(self, pictures: Sequence[np.ndarray], turns: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
        """pixel_values and image_grid_thw of the pictures; input_ids and attention_mask [N, L] of turns, of which each
        shows one picture; row int64 [N], which one that is."""
        pixels, grids = self.processor.vision([Image.fromarray(picture) for picture in pictures])
        batch = {"pixel_values": pixels, "image_grid_thw": grids}
        if not turns:
            return batch
        pad, ids = self.processor.tokens.image_pad, []
        for _, text in turns:
            tokens = self.processor.tokenize(text)
            ids.append([token for token in tokens for _ in range(NUM_TOKENS if token == pad else 1)])
        input_ids, attention_mask = self.processor.pad(ids)
        rows = torch.tensor([row for row, _ in turns])
        return batch | {"input_ids": input_ids, "attention_mask": attention_mask, "row": rows}

    def conversations(
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
        before, after = self._labels(seen), self._labels(wanted)
        after["changed"] = changed = changed_points(before["points"], after["points"])
        edited = changed.any((1, 2))
        roles[edited, ..., 0] = changed_labels(before["points"], changed)[edited]
        return of_words | {"seen": before, "wanted": after, "asked": roles}

    def _labels(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        return dense_labels(scenes, NUM_POINTS)


def _talks(scene: Scene, words: Wording, split: str) -> list[tuple[Question, ...]]:
    """About NUM_ASKED questions, each behind up to MAX_BEFORE others of the same conversation; NUM_COMPARING of them
    compare, besides those that come by chance, or fewer where the scene has no more of those."""
    talk = converse(scene, words, split, 1 + NUM_ASKED - NUM_COMPARING)
    talks = [talk[max(0, i - words.pick(range(1, 1 + MAX_BEFORE))) : i + 1] for i in range(len(talk))]
    for question in _comparing(scene, words, split):
        begin = words.pick(range(1 + len(talk)))
        talks.append((*talk[begin : begin + words.pick(range(1 + MAX_BEFORE))], question))
    return [told for told in talks if not told[-1].kind.startswith("caption")]


def _comparing(scene: Scene, words: Wording, split: str) -> list[Question]:
    """NUM_COMPARING, or fewer where the scene has no more to compare."""
    if scene.style in COLOURLESS_STYLES:
        return []
    tried = (ask(words.pick(COMPARING), scene, words, split) for _ in range(TRIES * NUM_COMPARING))
    return list(itertools.islice((q for q in tried if q is not None), NUM_COMPARING))


def _unseen(item: Item, questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """The `unseen_answers` of questions about an item's picture."""
    words = wording(item.language, np.random.default_rng(0))
    return [unseen_answers(question, item.scenes[0], words) for question in questions]


def _shown(text: str) -> str:
    """A user's turn up to its picture: what comes behind does not change the states of the picture's tokens."""
    return f"{TURN_START}user\n{text}{IMAGE}"
