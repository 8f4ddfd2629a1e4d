"""Training of the parts of `tiny`: the loop goes on bit by bit, and the recipe of each part learns."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from uniworld.checkpoint import tiny
from uniworld.checkpoint.names import VLM, authors_names
from uniworld.config import CheckpointConfig, EMAConfig, OptimConfig
from uniworld.data.scenes import edits
from uniworld.data.scenes.tasks import make_item
from uniworld.engine import Engine
from uniworld.models.prompts import ANSWER_START, VLMInputs
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.task_head import TaskHead
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vae import ImageAutoencoder, to_pixels
from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.checkpoints import complete_checkpoints
from uniworld.train.metrics import read_metrics
from uniworld.train.parts import (
    base,
    conversations,
    dense,
    loop,
    make_part,
    semantic_encoder,
    task_head,
    vae,
    vlm_batches,
)
from uniworld.train.parts import words as parts_words
from uniworld.train.parts.config import PartConfig, load_part_config
from uniworld.train.parts.grounding import NO_QUESTION, PLAYS
from uniworld.train.parts.start import write_start
from uniworld.train.parts.vae import picture as picture_of

ROOT = Path(__file__).resolve().parent.parent


class Line:
    """A part that fits y = 3 x - 1, from noisy points."""

    not_for_making = ("module",)

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Linear(1, 1)

    def make(self, seeds):
        x = torch.tensor(np.stack([np.random.default_rng(seed).normal(size=1) for seed in seeds]), dtype=torch.float32)
        return {"x": x, "y": 3 * x - 1}

    def loss(self, batch, generator):
        noise = torch.randn(batch["y"].shape, generator=generator)
        error = self.module(batch["x"].to(self.module.weight.dtype)) - batch["y"] - 0.1 * noise
        return error.square().mean(), {"largest": error.detach().abs().max()}

    def score(self):
        return {"slope": float(self.module.weight.detach())}

    def export(self, folder):
        torch.save(self.module.state_dict(), folder / "line.pt")


def line_config(folder, **changes):
    settings = {
        "part": "vae",
        "run_dir": str(folder),
        "num_steps": 20,
        "batch_size": 8,
        "num_workers": 0,
        "log_every_steps": 1,
        "optim": OptimConfig(lr=0.1),
        "ema": EMAConfig(decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=5),
    }
    return PartConfig(**settings | changes)


def train(config, part=None, **more):
    trainer = loop.PartTrainer(config, part or Line(), quiet=True)
    return trainer, trainer.run(**more)


def final_state(folder):
    last = complete_checkpoints(folder / "checkpoints")[-1]
    return {name: load_file(last.folder / name) for name in (loop.WEIGHTS, loop.AVERAGE)}, last.step


def test_a_line_is_found(tmp_path):
    config = line_config(tmp_path, num_steps=200)
    trainer, code = train(config)
    scores, folder = trainer.finish()
    assert code == 0 and scores["slope"] == pytest.approx(3, abs=0.1)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    saved = torch.load(folder / "line.pt", weights_only=True)
    assert float(saved["weight"]) == scores["slope"]
    assert torch.equal(saved["weight"], final_state(tmp_path)[0][loop.AVERAGE]["weight"])  # the average, not the last


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_pieces_is_the_run_in_one(tmp_path, optimizer):
    optim = OptimConfig(name=optimizer, lr=0.1)
    train(line_config(tmp_path / "one", optim=optim))
    pieces = line_config(tmp_path / "pieces", optim=optim, checkpoint=CheckpointConfig(every_steps=100))
    codes = [train(pieces, seconds=0)[1] for _ in range(20)]
    assert codes == 19 * [loop.EXIT_STOPPED] + [0]
    assert final_state(tmp_path / "pieces")[1] == 20
    for whole, pieced in zip(final_state(tmp_path / "one")[0].values(), final_state(tmp_path / "pieces")[0].values()):
        assert all(torch.equal(whole[name], pieced[name]) for name in whole)
    logged = [[(r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("one", "pieces")]
    assert logged[0] == logged[1] and len(logged[0]) == 20


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    class Mortal(Line):
        def loss(self, batch, generator):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return super().loss(batch, generator)

    mortal = Mortal()
    mortal.left = 13
    with pytest.raises(Killed):
        train(line_config(tmp_path / "killed"), mortal)
    train(line_config(tmp_path / "killed"))
    train(line_config(tmp_path / "one"))
    for whole, pieced in zip(final_state(tmp_path / "one")[0].values(), final_state(tmp_path / "killed")[0].values()):
        assert all(torch.equal(whole[name], pieced[name]) for name in whole)


def test_workers_change_nothing(tmp_path):
    config = PartConfig(part="vae", run_dir=str(tmp_path), num_steps=2, batch_size=2, size_px=64, num_workers=1)
    part = make_part(config)
    (batch,) = list(loop.PartTrainer(replace(config, num_steps=1), part, quiet=True)._batches())
    here = part.make(range(2))
    assert batch.keys() == here.keys() and all(torch.equal(tensor, here[name]) for name, tensor in batch.items())


def test_a_run_may_begin_behind_the_items_of_another(tmp_path):
    config = line_config(tmp_path, num_steps=2, batch_size=4, first_item=40)
    made = []
    with mock.patch.object(Line, "make", lambda self, seeds: made.append(seeds)):
        list(loop.PartTrainer(config, Line(), quiet=True)._batches())
    assert made == [range(40, 44), range(44, 48)]
    with pytest.raises(ValueError, match="first_item=-1: must be at least 0"):
        line_config(tmp_path, first_item=-1)


def test_weights_in_bf16_have_masters_that_are_not_rounded(tmp_path):
    """A step too small for bf16 counts; what is saved, averaged and exported is what is optimized."""
    config = line_config(tmp_path / "bf16", dtype="bf16", num_steps=9, optim=OptimConfig(lr=1e-4))
    trainer, _ = train(config)
    plain, _ = train(replace(config, run_dir=str(tmp_path / "fp32"), dtype="fp32"))
    start = Line().module.weight.detach()
    moved = [float((weights["weight"] - start).abs()) for weights in final_state(tmp_path / "bf16")[0].values()]
    assert all(0 < by < 2e-3 for by in moved), moved
    assert trainer.part.module.weight.dtype == torch.bfloat16 and trainer.masters[0].dtype == torch.float32
    assert torch.allclose(trainer.masters[0], plain.masters[0], atol=2e-5)
    again = loop.PartTrainer(config, Line(), quiet=True)
    again._restore()
    assert torch.equal(again.masters[0], trainer.masters[0])
    assert torch.equal(again.part.module.weight, trainer.masters[0].bfloat16())
    trainer.finish()
    assert torch.equal(trainer.part.module.weight, trainer.average[0])  # in fp32


def test_tied_weights_are_kept_once_and_come_back(tmp_path):
    """As T5's embedding, which has two names."""

    class Tied(Line):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)})
            self.module["second"].weight = self.module["first"].weight

        def loss(self, batch, generator):
            y = self.module["second"](self.module["first"](batch["x"]))
            return (y - batch["y"]).square().mean(), {}

    first, _ = train(line_config(tmp_path, num_steps=20), Tied())
    again = loop.PartTrainer(line_config(tmp_path, num_steps=20), Tied(), quiet=True)
    again._restore()
    assert list(final_state(tmp_path)[0][loop.WEIGHTS]) == ["first.bias", "first.weight", "second.bias"]
    assert torch.equal(again.part.module["second"].weight, first.part.module["first"].weight)
    with pytest.raises(ValueError, match=r"is of another model \(bias"):
        loop.PartTrainer(line_config(tmp_path, num_steps=30), Line(), quiet=True)._restore()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Broken(Line):
        def loss(self, batch, generator):
            loss, more = super().loss(batch, generator)
            return loss * math.nan, more

    with pytest.raises(ValueError, match="step 1: loss nan, its gradient is not finite"):
        train(line_config(tmp_path), Broken())


def test_the_autoencoder_learns_and_its_latents_have_unit_size(tmp_path):
    """A few seconds at 64 pixels."""
    config = load_part_config(
        ROOT / "configs" / "tiny" / "vae.yaml",
        [f"run_dir={tmp_path}", "num_steps=40", "size_px=64", "batch_size=4", "num_checked=16", "num_workers=0"]
        + ["ema.decay=0.8", "optim.lr=1e-2", "optim.warmup_steps=5"],
    )
    fresh = make_part(config).score()["psnr_db"]
    trainer, _ = train(config, make_part(config))
    scores, folder = trainer.finish()
    assert fresh < 11.5 and scores["psnr_db"] > fresh + 2.5, (fresh, scores)
    assert scores["psnr_things_db"] != scores["psnr_db"] and scores["psnr_things_db"] > 8
    vae = ImageAutoencoder.from_config(json.loads((folder / "config.json").read_text()))
    vae.model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    pixels = torch.cat([to_pixels(Image.fromarray(picture_of(seed, "train", 64))) for seed in range(16)])
    latents = vae.mean_latents(pixels)
    assert float(latents.mean()) == pytest.approx(0, abs=0.2) and float(latents.std()) == pytest.approx(1, abs=0.2)
    with torch.no_grad():
        module = trainer.part.module
        expected = module.decode(module.encode(pixels).latent_dist.mean).sample
    assert float((vae.decode(latents) - expected).norm() / expected.norm()) < 0.05  # stored in bf16


def test_a_pixel_of_a_thing_counts_more(tmp_path):
    """The loss of a made-up error: there and elsewhere, in the proportion of the weights."""
    config = PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, size_px=64, batch_size=2)
    part = make_part(config)
    batch = part.make(range(2))
    assert batch["pictures"].shape == (2, 64, 64, 3) and 0.01 < batch["there"].float().mean() < 0.6
    pixels, there = vae.as_pixels(batch["pictures"]), batch["there"][:, None].float()
    losses = []
    for error in (0.1 * there, 0.1 * (1 - there)):
        decoded = SimpleNamespace(sample=pixels + error)
        with mock.patch.object(part.module, "decode", return_value=decoded):
            losses.append(float(part.loss(batch, torch.Generator())[0].detach()))
    share = float(there.mean())
    assert losses[0] / losses[1] == pytest.approx(vae.THING_WEIGHT * share / (1 - share), rel=1e-2)


def overfit(part, batch, num_steps, lr):
    """Train on one batch alone; (loss, what else is logged) of each step."""
    optimizer, generator = torch.optim.AdamW(part.module.parameters(), lr=lr), torch.Generator()
    logged = []
    for _ in range(num_steps):
        loss, more = part.loss(batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append((float(loss.detach()), {name: float(value) for name, value in more.items()}))
    return logged


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Tokenizers that learned from a few texts."""
    folder = tmp_path_factory.mktemp("words") / "words"
    with mock.patch.object(parts_words, "texts", lambda: parts_words.learned_texts(100)):
        return parts_words.open_tokenizers(folder)


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
    looked, again, asked, planned, told = (part.make(range(first, first + 4)) for first in (0, 4, 8, 12, 16))
    assert vlm_batches.LATER_TURNS == ("converse", "look", "ask", "plan")
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
    """Every question stands alone before its picture, and is answered as in a conversation of one turn."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, "look_items=0"))
    batch, items = part.make(range(8, 12)), [make_item("understanding", seed, "train") for seed in range(8, 12)]
    rows, tokenizer = batch["row"].tolist(), part.processor.tokenizer
    assert len(rows) > 14 and batch["asked"].shape == (len(rows), 24, 24, 3)
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
    with mock.patch.object(vlm_batches, "converse", return_value=()):  # of few pictures there may be nothing to ask
        alone = part.make(range(10, 11))
    assert alone.keys() == {"pixel_values", "image_grid_thw", "seen"} and float(part.loss(alone, None)[0].detach()) > 0
    logged = overfit(part, batch, num_steps=40, lr=3e-3)
    assert logged[-1][1]["answers"] < 0.6 * logged[0][1]["answers"], logged[::8]


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


@pytest.fixture(scope="module")
def language(words, tmp_path_factory):
    """The vision-language part after 60 steps on one batch, its first loss, its last one, and that batch."""
    folder = tmp_path_factory.mktemp("vlm")
    changes = [f"run_dir={folder}", f"words={words}", "num_checked=4", "size_px=64", "look_items=0"]
    part = make_part(load_part_config(ROOT / "configs" / "tiny" / "vlm.yaml", changes))
    batch = part.make(range(4))
    losses = [loss for loss, _ in overfit(part, batch, num_steps=60, lr=3e-3)]
    return part, losses, batch


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
        assert tokenizer.decode(learned) == "".join(f"{answer}<|im_end|>" for answer in answers)
        assert torch.equal(learned, batch["input_ids"][row][labels != conversations.IGNORED])
    edit = make_item("edit", 1, "train", size_px=64)
    assert edit.conversations[-1]["value"] == "<gen_image>" and batch["image_grid_thw"].shape[0] == 4


def test_the_language_part_learns(language):
    _, losses, _ = language
    assert losses[0] > 5 and losses[-1] < losses[0] / 3, losses[::10]


def test_answers_count_as_right_where_decoding_gives_them(language):
    part, _, _ = language
    items = [make_item("understanding", seed, "train", size_px=64) for seed in (0, 2, 3, 7)]
    talks = [conversations.answered(item)[:2] for item in items]
    right = part._right(part.batches.conversations(items, talks))
    vlm_model, processor = part.vlm, part.processor
    for i, (item, turns) in enumerate(zip(items, talks)):
        prompt = conversations.conversation_text(turns[:1]) + ANSWER_START
        states = vlm_model.encode(processor.encode([prompt], [[Image.fromarray(item.pictures[0])]]), use_cache=True)
        ids = vlm_model.stream_text(states, max_new_tokens=60, stop_ids=[processor.tokens.turn_end])
        assert (processor.decode(list(ids)) == turns[1]["value"]) == right[i], (turns, right[i])
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


@pytest.fixture(scope="module")
def parts(words, language, tmp_path_factory):
    """A folder of parts that the later ones build on: a fresh autoencoder, and the VLM that learned one batch."""
    folder = tmp_path_factory.mktemp("parts")
    vae = make_part(PartConfig(part="vae", run_dir=str(folder / "vae"), num_steps=1, num_checked=32))
    with torch.no_grad():
        vae.module.encoder.conv_out.bias[16:] = -10  # log variance: latents with hardly any noise, as trained ones
    vae.export(folder / "vae" / "model")
    language[0].export(folder / "vlm" / "model")
    return folder


def test_the_semantic_encoder_learns_which_caption_is_whose(words, parts, tmp_path):
    changes = [f"run_dir={tmp_path}", f"words={words}", f"parts={parts}", "num_checked=32"]
    part = make_part(load_part_config(ROOT / "configs" / "tiny" / "semantic_encoder.yaml", changes))
    batch = part.make(range(8))
    assert batch["levels"].shape == (8, 128, 128, 3) and batch["mask"][:, 0].all()
    logged = [more for _, more in overfit(part, batch, num_steps=60, lr=2e-3)]
    assert logged[0]["found"] < 0.6 and logged[-1]["found"] == 1, logged[-1]
    assert logged[-1]["psnr_db"] > logged[0]["psnr_db"] + 3
    assert logged[-1]["background_right"] == 1 and logged[-1]["style_right"] == 1, logged[-1]
    assert logged[-1]["place_right"] > 2 * logged[0]["place_right"], logged[-1]
    assert logged[-1]["latents_error"] < 0.5 * logged[0]["latents_error"], logged[-1]
    scores = part.score()
    assert scores["found"] < 0.5  # of pictures it has not seen: 1 of 32 by chance
    assert set(scores) == {"found", "psnr_db", "place_right", "surface_error", "latents_error", "things_error"} | {
        f"{name}_right" for name in (*dense.OF_A_THING, *dense.OF_A_SCENE)
    }
    part.export(tmp_path)
    settings = [json.loads((tmp_path / name).read_text()) for name in ("config.json", "preprocessor_config.json")]
    encoder = SemanticEncoder.from_config(*settings)
    weights = load_file(tmp_path / "model.safetensors")
    names = {name: name if name in weights else f"vision_model.{name}" for name, _ in encoder.model.named_parameters()}
    assert set(names.values()) == set(weights)
    encoder.model.load_state_dict({name: weights[key] for name, key in names.items()}, strict=False)
    pictures = [Image.fromarray(levels.numpy()) for levels in batch["levels"]]
    with torch.no_grad():
        states = part.module.vision(encoder.preprocess(pictures)).last_hidden_state
    assert float((encoder(encoder.preprocess(pictures)) - states).norm() / states.norm()) < 0.05  # bf16


def test_sigmoid_loss_is_siglips(parts):
    """Equation 1 of Zhai et al., written out pair by pair."""
    part = object.__new__(semantic_encoder.Contrastive)
    torch.manual_seed(0)
    part.module, part.vae = semantic_encoder.TwoTowers(50), vae.load_vae(parts / "vae" / "model")
    batch = {
        "levels": torch.randint(256, (3, 128, 128, 3), dtype=torch.uint8),
        "ids": torch.randint(50, (3, 7)),
        "mask": torch.ones(3, 7, dtype=torch.bool),
        **dense.dense_labels([make_item("t2i", seed, size_px=64).scenes[0] for seed in range(3)], 32),
    }
    with torch.no_grad():
        _, more = part.loss(batch, torch.Generator())
        states = part.module.vision(semantic_encoder.as_pixels(batch["levels"])).last_hidden_state
        x, y = part.module.embed_pictures(states), part.module.embed_captions(batch["ids"], batch["mask"])
    expected = 0.0
    for i in range(3):
        for j in range(3):
            logit = 10 * float(x[i] @ y[j]) - 10
            expected -= math.log(1 / (1 + math.exp(-logit if i == j else logit))) / 3
    assert float(more["contrastive"]) == pytest.approx(expected, rel=1e-4)


def part_config(name, folder, words, parts, *more):
    changes = [f"run_dir={folder}", f"words={words}", f"parts={parts}", "num_checked=32", *more]
    return load_part_config(ROOT / "configs" / "tiny" / f"{name}.yaml", changes)


def test_the_base_learns_and_diffusers_reads_it(words, parts, tmp_path):
    """Its loss falls on one batch; what it exports gives diffusers' and transformers' modules the same velocity."""
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    part = make_part(part_config("base", tmp_path, words, parts))
    batch = part.make(range(2))
    assert batch["mean"].shape == (2, 16, 16, 16) and batch["t5_ids"].shape == (2, parts_words.T5_TOKENS)
    logged = overfit(part, batch, num_steps=40, lr=1.5e-3)
    losses = [more["flow"] for _, more in logged]
    assert logged[-1][0] - losses[-1] < 0.5 * (logged[0][0] - losses[0]), logged[::10]  # what will stand where
    at_zero = 1 + float((batch["mean"].square() + batch["std"].square()).mean())  # the square of noise - latents
    assert losses[0] == pytest.approx(at_zero, rel=0.1)
    assert np.mean(losses[-5:]) < 0.88 * losses[0], losses[::5]

    part.export(tmp_path / "model")
    model = tmp_path / "model"
    theirs = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer", torch_dtype=torch.float32)
    t5 = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_2", dtype=torch.float32)
    clip = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=torch.float32)
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma, guidance, without = torch.rand(2), torch.full((2,), 2.0), torch.tensor([False, True])
    with torch.no_grad():
        states, pooled = part._condition(batch, without, torch.zeros_like(without))
        ours, _ = part._predict(states, pooled, torch.zeros_like(noise), noise, sigma, guidance)
        noisy = (noise * sigma[:, None, None, None]).view(2, 16, 8, 2, 8, 2)
        packed = noisy.permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 64)
        pooled = clip(batch["clip_ids"]).pooler_output
        empty = part.text.clip_tokenizer([""], padding="max_length", max_length=77, return_tensors="pt").input_ids
        pooled[without] = clip(empty).pooler_output
        expected = theirs(
            packed,
            encoder_hidden_states=t5(batch["t5_ids"]).last_hidden_state,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            img_ids=torch.tensor([[0, row, column] for row in range(8) for column in range(8)]).float(),
            txt_ids=torch.zeros(parts_words.T5_TOKENS, 3),
        ).sample
    assert float((ours - expected).norm() / expected.norm()) < 0.03  # stored in bf16
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"vae", "tokenizer", "tokenizer_2", "scheduler"}


def test_guidance_is_learned_from_the_model_itself(words, parts, tmp_path):
    """The target moves by (1 - 1/g) of what words change, but not where there are none; "" is what they are against."""
    part = make_part(part_config("base", tmp_path, words, parts, "plain_items=4", "dtype=fp32"))
    for parameter in part.module.parameters():  # or nothing heeds the words: every block starts at zero
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    plain, batch = part.make(range(4)), part.make(range(4, 8))
    assert (bool(plain["guided"]), bool(batch["guided"])) == (False, True)
    calls, predict = [], part._predict

    def recorded(states, pooled, latents, noise, sigma, guidance):
        found = predict(states, pooled, latents, noise, sigma, guidance)
        calls.append((states, pooled, guidance, *found))
        return found

    with mock.patch.object(part, "_predict", recorded), mock.patch.object(base, "NO_TEXT_RATE", 0.5):
        _, more = part.loss(batch, torch.Generator().manual_seed(1))
        part.loss(plain, torch.Generator().manual_seed(1))
    (states, _, guidance, pred, target), (nothing, empty_pooled, ones, alone, _), last = calls
    assert len(calls) == 3 and last[0] is not states  # the plain batch takes one pass
    empty = part.text.t5_states([""])
    assert torch.allclose(nothing, empty.expand_as(nothing), atol=1e-5) and (ones == 1).all()
    assert torch.allclose(empty_pooled, part.text.pooled([""]).expand_as(empty_pooled), atol=1e-5)
    silent = torch.tensor([torch.allclose(state, empty[0], atol=1e-5) for state in states])
    assert silent.any() and not silent.all() and guidance.min() >= 1 and guidance.max() <= 5
    by_hand = []
    for row in range(4):
        share = 0 if silent[row] else 1 - 1 / float(guidance[row])
        wanted = target[row].double() + share * (pred[row] - alone[row]).double()
        by_hand.append((pred[row].double() - wanted).square().mean())
    assert float(more["flow"]) == pytest.approx(float(torch.stack(by_hand).mean().detach()), rel=1e-4)
    assert not torch.allclose(pred[~silent], alone[~silent], atol=1e-3)


def test_latents_are_those_of_the_autoencoder_and_are_made_once(words, parts, tmp_path):
    config = part_config("base", tmp_path, words, parts, "num_items=6")
    part = make_part(config)
    batch = part.make(range(4, 8))  # items 4, 5, and 0, 1 again
    labels = dense.dense_labels([make_item(base.TASKS[n], n).scenes[-1] for n in (4, 5, 0, 1)], 16)
    assert all(torch.equal(batch[name], labels[name].long()) for name in ("points", "whole"))
    assert torch.equal(batch["said"], dense.said_labels([make_item(base.TASKS[n], n).scenes[-1] for n in (4, 5, 0, 1)]))
    vae = ImageAutoencoder.from_config(json.loads((parts / "vae" / "model" / "config.json").read_text()))
    vae.model.load_state_dict(load_file(parts / "vae" / "model" / "diffusion_pytorch_model.safetensors"))
    pictures = [make_item(base.TASKS[n], n).pictures[-1] for n in (4, 5, 0, 1)]
    expected = vae.mean_latents(torch.cat([to_pixels(Image.fromarray(picture)) for picture in pictures]))
    assert torch.allclose(batch["mean"], expected, atol=2e-3, rtol=2e-3)  # kept in fp16
    assert part.text.t5_tokenizer.decode(batch["t5_ids"][2], skip_special_tokens=True) == base.what_is_said(
        make_item(base.TASKS[0], 0)
    )
    again = make_part(config)
    with mock.patch.object(base, "make_item", side_effect=AssertionError("made again")):
        known = again.make(range(4, 8))
        assert all(torch.equal(known[name], batch[name]) for name in batch)
        with pytest.raises(AssertionError, match="made again"):
            again.make(range(2, 3))
    with pytest.raises(ValueError, match="holds float16 .6, 2, 16, 16, 16., not float16 .7,"):
        make_part(replace(config, num_items=7)).make(range(1))


def test_the_base_draws_its_samples_and_scores(words, parts, tmp_path):
    part = make_part(part_config("base", tmp_path, words, parts, "num_checked=8"))
    scores = part.score()
    moments, _ = part._make_items(range(32), "held-out")
    at_zero = 1 + float(np.square(moments.astype(np.float32)).sum(1).mean())
    assert list(scores.values()) == pytest.approx(3 * [at_zero], rel=0.05), scores
    assert Image.open(tmp_path / "samples.png").size == (512, 512)
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 16


def test_redux_learns_to_draw_what_it_is_shown(words, parts, tmp_path):
    """From the base's weights; pictures that it has learned, shown in another order, are no longer those wanted."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    for name in ("semantic_encoder", "base"):
        make_part(part_config(name, tmp_path / name, words, tmp_path)).export(tmp_path / name / "model")
    part = make_part(part_config("redux", tmp_path / "redux", words, tmp_path, "num_items=8"))
    base_weights = load_file(tmp_path / "base" / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("x_embedder.weight", "single_transformer_blocks.0.proj_mlp.weight"):
        assert torch.equal(part.module.denoiser.get_parameter(name), base_weights[name].float())
    batch = part.make(range(4))
    pictures = [Image.fromarray(make_item(base.TASKS[n], n).pictures[-1]) for n in range(4)]
    states = part.encoder(part.encoder.preprocess(pictures))
    assert float((batch["states"] - states).norm() / states.norm()) < 1e-3  # kept in fp16
    without_states = make_part(part_config("base", tmp_path / "base", words, tmp_path, "num_items=8")).make(range(4))
    assert all(torch.equal(batch[name], without_states[name]) for name in ("mean", "std", "t5_ids", "clip_ids"))

    logged = overfit(part, batch, num_steps=40, lr=1.5e-3)
    assert np.mean([more["pictures"] for _, more in logged[-5:]]) < 0.8 * logged[0][1]["pictures"], logged[::10]
    assert all(not p.requires_grad for p in (*part.module.t5.parameters(), *part.module.clip.parameters()))
    with torch.no_grad():
        shown, swapped = (
            np.mean(
                [
                    float(part.loss(batch | {"states": s}, torch.Generator().manual_seed(n))[1]["pictures"])
                    for n in range(8)
                ]
            )
            for s in (batch["states"], batch["states"].roll(1, 0))
        )
    assert shown < swapped


def test_the_language_connector_learns_to_give_what_the_semantic_one_gives(words, parts, tmp_path):
    """Of the tokens of an edit's picture what the semantic connector gives of the wanted one at the same places."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    for name in ("semantic_encoder", "base", "redux"):
        make_part(part_config(name, tmp_path / name, words, tmp_path)).export(tmp_path / name / "model")
    part = make_part(part_config("align", tmp_path / "align", words, tmp_path, "num_items=8"))
    batch, item = part.make(range(4)), make_item("edit", 2, "train")
    states = part.encoder(part.encoder.preprocess([Image.fromarray(item.pictures[-1])]))
    assert torch.allclose(batch["wanted"][2], states[0], atol=0.02)  # kept in fp16
    prompt = conversations.conversation_text(item.conversations[:-1])
    inputs = part.processor.encode([prompt], [[Image.fromarray(item.pictures[0])]])
    of_picture = inputs.input_ids == part.processor.tokens.image_pad
    assert torch.allclose(batch["plans"][2], part.vlm.encode(inputs).hidden_states[of_picture], atol=0.02)

    _, wanted = part._given_and_wanted(batch)
    columns = torch.arange(8.0).repeat(8)[None, :, None].expand(1, 64, 192)  # a connector that gives a patch's column
    with mock.patch.object(part.semantic, "forward", lambda _: columns[0]):
        _, places = part._given_and_wanted({name: tensor[:1] for name, tensor in batch.items()})
    steps = places[0, :6, 0].diff()
    assert (steps > 1).all() and float(places.mean()) == pytest.approx(3.5, abs=1e-3)
    assert torch.allclose(places[0, :6, 0], places[0, 30:, 0], atol=1e-5)  # the same in every row
    logged = overfit(part, batch, num_steps=60, lr=3e-3)
    assert logged[-1][0] < 0.3 * logged[0][0], logged[::10]
    given = part._given_and_wanted(batch)[0].detach()
    by_hand = 1 - float((given - wanted).square().mean() / wanted.var())
    assert float(part.loss(batch, torch.Generator())[1]["explained"]) == pytest.approx(by_hand, rel=1e-4)
    assert part.score()["explained"] < by_hand  # of edits it has not seen
    part.export(tmp_path / "made")
    own = load_file(tmp_path / "made" / "denoise_projector.safetensors")
    named = {f"denoise_tower.denoise_projector.{name}": p for name, p in part.module.named_parameters()}
    assert own.keys() == named.keys() and all(torch.equal(own[name], p) for name, p in named.items())
    redux = tmp_path / "redux" / "model" / "siglip_projector.safetensors"
    copied = load_file(tmp_path / "made" / "siglip_projector.safetensors")
    assert all(torch.equal(tensor, copied[name]) for name, tensor in load_file(redux).items())


def test_a_part_says_which_other_it_needs(words, parts, tmp_path):
    for name, wanted in (("base", "vae/model: holds no image autoencoder"), ("task_head", "vlm/model: holds no VLM")):
        with pytest.raises(FileNotFoundError, match=f"{wanted}; train"):
            make_part(part_config(name, tmp_path, words, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"base/model is not there; train it first .configs/tiny/base.yaml"):
        make_part(part_config("redux", tmp_path, words, parts))


def test_the_autoencoder_may_start_from_exported_weights(parts, tmp_path):
    folder = parts / "vae" / "model"
    part = make_part(PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, seed=7, start=str(folder)))
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, stored[name].float()) and p.requires_grad for name, p in part.module.named_parameters())
    with pytest.raises(ValueError, match="only parts vae, vlm, semantic_encoder start from exported weights, not base"):
        PartConfig(part="base", run_dir=str(tmp_path), num_steps=1, start=str(folder))


def test_the_language_part_may_start_from_a_whole_model(words, tmp_path):
    """Of the packaged model the VLM alone is read."""
    part = make_part(part_config("vlm", tmp_path, words, tmp_path, f"start={tiny.PACKAGED}"))
    stored = {}
    for path in sorted(tiny.PACKAGED.glob("model-*.safetensors")):
        stored |= load_file(path)
    named = list(part.vlm.model.named_parameters())
    assert all(torch.equal(p, stored[authors_names(VLM, name)[0]].float()) and p.requires_grad for name, p in named)


def test_a_decoder_alone_leaves_the_latents_as_they_are(parts, tmp_path):
    folder = parts / "vae" / "model"
    config = PartConfig(
        part="vae", run_dir=str(tmp_path), num_steps=3, batch_size=2, start=str(folder), decoder_only=True,
        num_checked=32, optim=OptimConfig(lr=1e-2), num_workers=0, size_px=64,
    )  # fmt: skip
    trainer, _ = train(config, make_part(config))
    _, made = trainer.finish()
    before, after = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (folder, made))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("encoder.")} <= same
    assert not any(name.startswith("decoder.") and name.endswith("weight") and "norm" not in name for name in same)
    scaling = [json.loads((path / "config.json").read_text()) for path in (folder, made)]
    assert scaling[0] == scaling[1]
    with pytest.raises(ValueError, match="decoder_only=True: is of part vae with start"):
        PartConfig(part="vae", run_dir=str(tmp_path), num_steps=1, decoder_only=True)


def test_the_task_head_learns_on_the_states_that_the_engine_routes_by(words, parts, tmp_path):
    part = make_part(part_config("task_head", tmp_path, words, parts, "num_items=20"))
    batch = part.make(range(16))
    with mock.patch.object(task_head, "make_item", side_effect=AssertionError("made again")):
        assert all(torch.equal(tensor, batch[name]) for name, tensor in part.make(range(20, 36)).items())
    assert batch["labels"].tolist() == [0, 1] * 8
    logged = [more["right"] for _, more in overfit(part, batch, num_steps=60, lr=3e-3)]
    assert np.mean(logged[-5:]) > 0.95, logged[::10]
    part.export(tmp_path / "model")
    head = TaskHead.from_file(tmp_path / "model" / "task_head_final.pt").float()
    states, labels = part._encode(range(16), "train")
    assert torch.equal(labels, batch["labels"]) and torch.allclose(states, batch["states"], atol=0.02)
    drawn = head.draw_probability(states) >= 0.5
    assert drawn.tolist() == [bool(label) for label in batch["labels"]]


def test_parts_make_a_checkpoint_that_draws_and_routes(words, parts, tmp_path):
    """What stage 1 starts from, with the connectors of Redux and of the alignment; the parts are hardly trained."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    for name in ("semantic_encoder", "base", "redux", "align", "task_head"):
        make_part(part_config(name, tmp_path / name, words, tmp_path)).export(tmp_path / name / "model")
    folder = write_start(tmp_path, tmp_path / "start")
    connector = load_file(tmp_path / "redux" / "model" / "siglip_projector.safetensors")
    connector |= load_file(tmp_path / "align" / "model" / "denoise_projector.safetensors")
    stored = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert all(torch.equal(stored[key], tensor.bfloat16()) for key, tensor in connector.items())
    assert not list((folder / "flux").glob("siglip_projector.*"))  # it stands in the checkpoint
    assert not (folder / "flux" / "transformer").exists()  # the checkpoint holds the DiT
    engine = Engine.from_pretrained(str(folder), progress=False)
    picture = Image.fromarray(picture_of(3, "train", 128))
    result = engine.edit(picture, "make the ball red", num_inference_steps=1, seed=0)
    assert result.images[0].size == (128, 128) and not engine.model.random_weights
    asked = [{"role": "user", "content": "what is this?"}]
    reply = engine.chat(asked, mode="auto", num_inference_steps=1, max_new_tokens=1)
    assert 0 < reply.draw_probability < 1


def test_routing_asks_as_the_engine_does(words):
    """A later turn of a talk has the earlier ones, with their pictures, before it."""
    talk = next(i for i in (make_item("understanding", s, size_px=64) for s in range(50)) if len(i.conversations) >= 4)
    prompt, pictures = task_head.asked_at(talk, 1)
    first, answer, second = (turn["value"].replace("<image>", "").strip() for turn in talk.conversations[:3])
    assert prompt == (
        f"<|im_start|>user\n{first}<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(pictures) == 1
    edit = make_item("edit", 3, size_px=64)
    prompt, pictures = task_head.asked_at(edit, 0)
    assert len(pictures) == 1 and np.array_equal(np.asarray(pictures[0]), edit.pictures[0])


def test_command_stops_in_time_and_goes_on(tmp_path):
    settings = [f"run_dir={tmp_path / 'run'}", "num_steps=3", "size_px=64", "batch_size=1", "num_checked=5"]
    config = str(ROOT / "configs" / "tiny" / "vae.yaml")
    command = [sys.executable, "-m", "uniworld.cli", "train-part", config, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*more):
        return subprocess.run([*command, *more], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)

    stopped = run("num_workers=0", "--minutes", "0")
    assert stopped.returncode == 143 and "stopped after step 1; run again to go on" in stopped.stderr, stopped.stderr
    done = run("num_workers=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    wrong = run("size_px=100")
    assert (wrong.returncode, wrong.stderr) == (2, "error: size_px=100: must be a multiple of 16 from 64 on\n")


def test_places_start_as_waves():
    """The products of two rows depend on how far apart they are, and are largest for a place with itself."""
    waves = semantic_encoder.place_waves(4, 16)
    products = (waves @ waves.T).view(4, 4, 4, 4)
    assert waves.shape == (16, 16)
    assert torch.equal(products.flatten(2).argmax(-1).flatten(), torch.arange(16))
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[0, 0, 0, 0], torch.tensor(8.0))
