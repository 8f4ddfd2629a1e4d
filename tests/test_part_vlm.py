"""The vision-language part of `tiny`: what its batches hold, and that it learns."""

import json
import pickle
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
import torch
from parts_of_tiny import ROOT, overfit, part_config
from PIL import Image
from safetensors.torch import load_file

from uniworld.checkpoint import tiny
from uniworld.checkpoint.names import VLM, authors_names
from uniworld.data.scenes import edits
from uniworld.data.scenes.questions import KINDS
from uniworld.data.scenes.tasks import make_item
from uniworld.data.scenes.wording import wording
from uniworld.models.prompts import ANSWER_START, VLMInputs
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.parts import conversations, dense, loop, make_part, vlm_batches
from uniworld.train.parts import words as parts_words
from uniworld.train.parts.config import load_part_config
from uniworld.train.parts.grounding import NO_QUESTION, PLAYS
from uniworld.train.parts.sizes import PREPROCESSOR


def test_a_short_answer_counts_nearly_as_much_as_a_caption():
    """Square averaging: answers of 1, 4 and 9 tokens, the last two in one row, weigh 1, 2 and 3 of 6."""
    labels = torch.full((2, 20), conversations.IGNORED)
    labels[0, 3], labels[1, 2:6], labels[1, 7:16] = 5, 5, 5
    weights = conversations.answer_weights(labels)
    sums = [float(w.sum()) for w in (weights[0, 3], weights[1, 2:6], weights[1, 7:16])]
    assert sums == pytest.approx([1 / 6, 2 / 6, 3 / 6]) and float(weights.sum()) == pytest.approx(1)
    assert float(weights[1, 2]) == float(weights[1, 5]) and float(weights[0, 4]) == 0


def test_it_looks_and_points_first(words, tmp_path):
    """From the first items tower and language model learn, and no answers; then conversations too."""
    changes = [f"run_dir={tmp_path}", f"words={words}", "look_items=4", "num_checked=4", "size_px=64"]
    part = make_part(load_part_config(ROOT / "configs" / "tiny" / "vlm.yaml", changes))
    turns = dict(zip(vlm_batches.LATER_TURNS, range(0, 40, 4)))  # the last seeds of each before 40
    firsts = 0, turns["ask"], turns["plan"], turns["look"]
    looked, asked, planned, again = (part.make(range(first, first + 4)) for first in firsts)
    told = part.make(range(40, 44))
    others = ("converse", "see", "plan", "look", "see")
    assert tuple(turn for other in others for turn in (other, "ask")) == vlm_batches.LATER_TURNS
    assert "labels" not in again and "row" in again and "row" not in told and "labels" in asked and "row" in asked
    assert "labels" not in looked and looked["seen"]["points"].shape == (4, 24, 24, 4)
    assert looked["asked"].shape == (len(looked["row"]), 24, 24, 3)
    assert set(looked["row"].tolist()) < {0, 1, 2, 3}  # one of them shows no colours
    logged = overfit(part, looked, num_steps=25, lr=2e-3)
    assert logged[-1][0] < 0.5 * logged[0][0], logged[::5]
    part.loss(looked, torch.Generator())[0].backward()
    learned = [name for name, p in part.module.named_parameters() if p.grad is not None]
    assert {name.split(".")[0] for name in learned} == {"vlm", "dense", "grounding1", "grounding2", "place"}
    assert not any(name.startswith(("vlm.model.language_model.layers.3", "vlm.lm_head")) for name in learned)
    assert told["labels"].max() >= 0 and told["seen"]["points"].shape[1:] == (24, 24, 4)
    assert "labels" not in planned and planned["wanted"]["changed"].any((1, 2)).sum() >= 4


def test_several_edits_of_a_picture_are_planned_at_once(words, tmp_path):
    """Of every instruction the labels are those of its own outcome, and the states are those of a whole request."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, "look_items=8"))
    batch, items = part.make(range(4, 8)), [make_item("edit", seed, "train") for seed in range(4, 8)]
    assert "labels" not in batch and part.make(range(4)).keys() == batch.keys() - {"wanted"}
    rows = batch["row"].tolist()
    first = [rows.index(row) for row in range(4)]
    assert len(rows) > 12 and rows == sorted(rows)
    before, after = (dense.dense_labels([item.scenes[n] for item in items], 24)["points"] for n in (0, 1))
    assert torch.equal(batch["seen"]["points"], before) and torch.equal(batch["wanted"]["points"][first], after)
    assert torch.equal(batch["wanted"]["changed"][first], (before != after).any(-1))
    assert torch.equal(batch["asked"][first, ..., 0] == PLAYS, (before != after).any(-1))
    assert (batch["asked"][..., 1:] == NO_QUESTION).all()
    with torch.no_grad():
        part.module.vlm.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        of_pictures = batch["input_ids"] == part.processor.tokens.image_pad
        together = part._states_of_turns(batch, of_pictures)[of_pictures].unflatten(0, (len(rows), -1))
        alone = part.batches.conversations(items, [item.conversations[:-1] for item in items])
        of_pictures = alone["input_ids"] == part.processor.tokens.image_pad
        expected = part._states(alone)[of_pictures].unflatten(0, (4, -1))
    assert torch.allclose(together[first], expected, atol=1e-4)
    logged = overfit(part, batch, num_steps=30, lr=3e-3)
    assert logged[-1][0] < 0.7 * logged[0][0], logged[::6]


def test_many_questions_about_a_picture_are_asked_at_once(words, tmp_path):
    """Every question stands before its picture, and is answered as in a conversation of its own."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, "look_items=0"))
    batch, items = part.make(range(4, 8)), [make_item("understanding", seed, "train") for seed in range(4, 8)]
    rows, tokenizer = batch["row"].tolist(), part.processor.tokenizer
    assert len(rows) > 14 and batch["asked"].shape == (len(rows), 24, 24, 3)
    assert batch["known"]["number"].shape == (len(rows), 3)
    assert torch.equal(batch["seen"]["points"], dense.dense_labels([item.scenes[0] for item in items], 24)["points"])
    told = [tokenizer.decode(ids[ids != conversations.IGNORED]) for ids in batch["labels"]]
    assert all(answer.endswith("<|im_end|>") and len(answer) > len("<|im_end|>") for answer in told)
    with torch.no_grad():
        part.module.vlm.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        states = part._states_of_turns(batch, batch["input_ids"] == part.processor.tokens.image_pad)
        for row in (0, len(rows) - 1):
            length = int(batch["attention_mask"][row].sum())
            text = tokenizer.decode(batch["input_ids"][row, :length])
            text = text.replace("<|image_pad|>" * 36, "<|image_pad|>")
            inputs = part.processor.encode([text], [[Image.fromarray(items[rows[row]].pictures[0])]])
            assert torch.equal(inputs.input_ids[0], batch["input_ids"][row, :length])
            alone = part.vlm.states(inputs).hidden_states[0]
            assert torch.allclose(states[row, :length], alone, atol=1e-4)
    with mock.patch.object(vlm_batches, "_talks", return_value=[]):  # of few pictures nothing may be asked
        alone = part.make(range(11, 12))
    assert alone.keys() == {"pixel_values", "image_grid_thw", "seen"} and float(part.loss(alone, None)[0].detach()) > 0
    logged = overfit(part, batch, num_steps=40, lr=3e-3)
    assert logged[-1][1]["answers"] < 0.6 * logged[0][1]["answers"], logged[::8]
    assert logged[-1][1]["known_number_right"] > 0.6 > 0.5 > logged[0][1]["known_number_right"], logged[::8]
    assert logged[-1][1]["looking"] < 0.1 < 5 < logged[0][1]["looking"] and "second_phrase_told" in logged[0][1]


def test_a_question_is_asked_behind_earlier_ones(words, tmp_path):
    """These and their answers are there to be read; the picture stands behind the last, which alone is learned."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, "look_items=0"))
    batch, tokens = part.make(range(4, 8)), part.processor.tokens
    num_answers = [int((ids == tokens.assistant).sum()) for ids in batch["input_ids"]]
    assert set(num_answers) == {1, 2, 3, 4}
    for ids, labels, number in zip(batch["input_ids"], batch["labels"], num_answers):
        said, learned = ids.tolist(), (labels != conversations.IGNORED).nonzero()[:, 0].tolist()
        last = len(said) - 1 - said[::-1].index(tokens.assistant)
        assert learned == list(range(last + 2, said.index(tokens.turn_end, last) + 1))
        assert said.count(tokens.vision_start) == 1
        turns = [i for i, token in enumerate(said[:last]) if token == tokens.turn_start]
        assert turns[-2] < said.index(tokens.vision_start) < turns[-1] and len(turns) == 2 * number
    read = []
    heads = [part.module[f"known{i}"] for i in (2, 3)]
    hooks = [head.register_forward_pre_hook(lambda head, args: read.append(args[0])) for head in heads]
    with torch.no_grad():
        part.loss(batch, None)
    for hook in hooks:
        hook.remove()
    ends = [int((ids == tokens.assistant).nonzero()[-1]) + 1 for ids in batch["input_ids"]]
    for index, states in zip((2, 3), read, strict=True):
        layer = part._at_layer[index]
        assert torch.equal(states, torch.stack([layer[row, at] for row, at in enumerate(ends)]))


def test_in_other_colours_nothing_is_said_of_colours(words, tmp_path):
    """What is seen is as before but for colours and materials, of which neither labels nor questions nor answers speak;
    and the same is shown in greys, in which it is to be seen too."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, "look_items=0"))
    batch, items = part.make(range(8, 12)), [make_item("understanding", seed, "train") for seed in range(8, 12)]
    points = dense.dense_labels([item.scenes[0] for item in items], 24)["points"]
    assert (batch["seen"]["points"][..., 1:3] == dense.UNNAMED).all() and "whole" not in batch["seen"]
    assert torch.equal(batch["seen"]["points"][..., [0, 3]], points[..., [0, 3]])
    assert (batch["known"]["things"][..., 1:3] == dense.UNNAMED).all() and len(batch["row"]) >= 3
    pixels, _ = part.processor.vision([Image.fromarray(item.pictures[0]) for item in items])
    assert pixels.shape == batch["pixel_values"].shape and not torch.equal(pixels, batch["pixel_values"])
    mean, std = (torch.tensor(PREPROCESSOR[f"image_{name}"]).view(3, 1) for name in ("mean", "std"))
    greys = batch["grey_values"].unflatten(-1, (3, -1)) * std + mean
    assert greys.flatten(1).shape == pixels.shape and (greys - greys[:, :1]).abs().max() < 1e-5
    colours = [word for language in ("en", "zh") for word in wording(language, None).words.COLOURS.values()]
    for ids in batch["input_ids"]:
        text = part.processor.tokenizer.decode(ids)
        assert not any(word in text for synonyms in colours for word in synonyms if word != "red"), text  # "covered"
    visual, read = part.module.vlm.model.visual, part.module.dense
    with torch.no_grad():
        coloured, grey = (
            visual(batch[name], grid_thw=batch["image_grid_thw"]).pooler_output.unflatten(0, (4, -1))
            for name in ("pixel_values", "grey_values")
        )
        expected = read.agreement(coloured, grey, batch["seen"]["points"])
        assert float(part.loss(batch, None)[1]["agreement"]) == pytest.approx(float(expected), rel=1e-4)
    logged = overfit(part, batch, num_steps=40, lr=3e-3)
    assert not any("colour" in name or "material" in name for name in logged[0][1])
    assert "known_shape_right" in logged[0][1]
    assert logged[-1][0] < 0.6 * logged[0][0], logged[::8]


def test_loader_processes_get_what_makes_batches(words, tmp_path):
    """It is sent to them without the module, whose hooks could not be."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path))
    maker = pickle.loads(pickle.dumps(loop._Steps(part, part.config))).maker
    assert maker.module is None
    assert torch.equal(part.make(range(2))["pixel_values"], maker.make(range(2))["pixel_values"])


def test_half_of_the_questions_compare_two_things_and_two_of_three_stand_behind_others():
    counts, behind = dict.fromkeys(KINDS, 0), []
    for seed in range(60):
        item = make_item("understanding", seed, "train", size_px=16)
        talks = vlm_batches._talks(item.scenes[0], wording(item.language, np.random.default_rng(seed)), item.split)
        assert len(talks) <= vlm_batches.NUM_ASKED + 1
        for *earlier, question in talks:
            counts[question.kind] += 1
            behind.append(len(earlier))
            assert question not in earlier
    share = sum(counts[kind] for kind in vlm_batches.COMPARING) / sum(counts.values())
    assert 0.45 < share < 0.6 and min(counts[kind] for kind in vlm_batches.COMPARING) > 5, counts
    assert not any(counts[kind] for kind in counts if kind.startswith("caption"))
    assert max(behind) == vlm_batches.MAX_BEFORE and 0.6 < np.mean([number > 0 for number in behind]) < 0.75


def test_states_of_pictures_say_what_is_to_be_where(language):
    """An edit's picture comes behind the words; its labels are those of the scene before and of the scene after."""
    part, _, batch = language
    assert vlm_batches.TASKS[1] == "edit"
    item, row = make_item("edit", 1, "train", size_px=64), 1
    ids = batch["input_ids"][row]
    places = (ids == part.processor.tokens.image_pad).nonzero()[:, 0]
    said = part.processor.tokenizer(item.facts.instruction, add_special_tokens=False).input_ids
    assert ids[: places[0]].tolist()[-1 - len(said) : -1] == said  # between them <|vision_start|>
    before, after = (dense.dense_labels([scene], 24) for scene in (item.scenes[0], item.scenes[-1]))
    for name in ("points", "whole", "surface"):
        assert torch.equal(batch["seen"][name][row], before[name][0])
        assert torch.equal(batch["wanted"][name][row], after[name][0])
    assert not torch.equal(batch["seen"]["points"][row], batch["wanted"]["points"][row])
    loss, more = part.loss(batch, torch.Generator())
    part.module.zero_grad()
    loss.backward()
    assert part.module["wanted"].points.weight.grad.abs().max() > 0 and 0 <= more["wanted_shape_right"] <= 1


def test_tokenizers_are_made_once_and_know_the_words(words):
    assert parts_words.open_tokenizers(words) == words
    for folder, name in ((words, "Qwen2Tokenizer"), (words / "flux" / "tokenizer_2", "T5Tokenizer")):
        tokenizer = load_tokenizer(folder, name)
        for text, limit in (("make the red ball blue", 12), ("把红色的球换成蓝色", 12), ("zürich costs 3 €", 40)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text and len(ids) <= limit, (name, text, ids)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_item_that_a_part_sees_has_a_caption(language):
    """Extracted things, too, which stand on no backdrop."""
    for task, kinds in (("edit", edits.KINDS), ("t2i", (None,)), ("compose", (None,))):
        for kind in kinds:
            item = make_item(task, 5, kind=kind, language=language, size_px=64)
            assert conversations.answered(item)[-1]["value"] and parts_words.caption(item)


def test_answers_alone_are_learned(language):
    """Labels, read back, are the answers; where no answer stands there is none."""
    part, _, batch = language
    tokenizer = part.processor.tokenizer
    for row in range(4):
        item = make_item(vlm_batches.TASKS[row], row, "train", size_px=64)
        answers = [turn["value"] for turn in conversations.answered(item) if turn["from"] == "gpt"]
        assert item.task != "understanding" or 2 <= len(answers) <= conversations.NUM_QUESTIONS
        labels = batch["labels"][row]
        learned = labels[labels != conversations.IGNORED]
        assert tokenizer.decode(learned) == f"{answers[-1]}<|im_end|>"
        assert torch.equal(learned, batch["input_ids"][row][labels != conversations.IGNORED])
    edit = make_item("edit", 1, "train", size_px=64)
    assert edit.conversations[-1]["value"] == "<gen_image>" and batch["image_grid_thw"].shape[0] == 4


def test_the_language_part_learns(language):
    _, losses, _ = language
    assert losses[0] > 5 and losses[-1] < losses[0] / 3, losses[::10]


def test_answers_count_as_right_where_decoding_gives_them(language):
    part, _, _ = language
    items = [make_item("understanding", seed, "train", size_px=64) for seed in (0, 2, 3, 7)]
    talks = [conversations.answered(item) for item in items]
    right = part._right(part.batches.conversations(items, talks))
    vlm_model, processor = part.vlm, part.processor
    for i, (item, turns) in enumerate(zip(items, talks)):
        prompt = conversations.conversation_text(turns[:-1]) + ANSWER_START
        states = vlm_model.encode(processor.encode([prompt], [[Image.fromarray(item.pictures[0])]]), use_cache=True)
        ids = vlm_model.stream_text(states, max_new_tokens=60, stop_ids=[processor.tokens.turn_end])
        assert (processor.decode(list(ids)) == turns[-1]["value"]) == right[i], (turns, right[i])
    assert any(right)


def test_the_exported_language_part_has_the_authors_names(language, tmp_path):
    part, _, batch = language
    part.export(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    vlm_keys = {key for key in tensors if key.startswith(("visual.", "model.", "lm_head."))}
    assert vlm_keys == set(tensors) and "model.embed_tokens.weight" in tensors
    fresh = VisionLanguageModel.from_config(json.loads((tmp_path / "config.json").read_text()))
    fresh.model.load_state_dict({n: tensors[authors_names(VLM, n)[0]] for n, _ in fresh.model.named_parameters()})
    inputs = VLMInputs(**{field.name: batch[field.name] for field in fields(VLMInputs)})
    ours, theirs = (model.encode(inputs).hidden_states for model in (part.vlm, fresh))
    assert float((ours - theirs).norm() / ours.norm()) < 0.05  # bf16


def test_the_language_part_may_start_from_a_whole_model(words, tmp_path):
    """Of the packaged model the VLM alone is read."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, f"start={tiny.PACKAGED}"))
    stored = {}
    for path in sorted(tiny.PACKAGED.glob("model-*.safetensors")):
        stored |= load_file(path)
    named = list(part.vlm.model.named_parameters())
    assert all(torch.equal(p, stored[authors_names(VLM, name)[0]].float()) and p.requires_grad for name, p in named)
