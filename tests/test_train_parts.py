"""The other parts of `tiny`, and the checkpoint that all make."""

import json
import math
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from parts_of_tiny import ROOT, overfit, part_config
from PIL import Image
from safetensors.torch import load_file

from uniworld.checkpoint import tiny
from uniworld.checkpoint.load import load_denoiser
from uniworld.data.scenes.tasks import make_item
from uniworld.engine import Engine
from uniworld.models.flow import pack
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.task_head import TaskHead
from uniworld.models.vae import ImageAutoencoder, to_pixels
from uniworld.train.parts import base, conversations, dense, make_part, semantic_encoder, task_head, vae
from uniworld.train.parts import words as parts_words
from uniworld.train.parts.config import load_part_config
from uniworld.train.parts.kept import KeptItems
from uniworld.train.parts.start import write_start
from uniworld.train.parts.vae import picture as picture_of


def test_the_semantic_encoder_learns_which_caption_is_whose(words, parts, tmp_path):
    changes = [f"run_dir={tmp_path}", f"words={words}", f"parts={parts}", "num_checked=32"]
    part = make_part(load_part_config(ROOT / "configs" / "tiny" / "semantic_encoder.yaml", changes))
    batch = part.make(range(8))
    assert batch["levels"].shape == (8, 128, 128, 3) and batch["mask"][:, 0].all()
    pixels = semantic_encoder.as_pixels(batch["levels"])
    latents = pack(vae.load_vae(parts / "vae" / "model").mean_latents(pixels))
    assert float((batch["latents"] - latents).norm() / latents.norm()) < 0.03  # bf16
    logged = [more for _, more in overfit(part, batch, num_steps=100, lr=2e-3)]
    assert logged[0]["found"] < 0.6 and logged[-1]["found"] == 1, logged[-1]
    assert logged[-1]["psnr_db"] > logged[0]["psnr_db"] + 3
    assert logged[-1]["background_right"] == 1 and logged[-1]["style_right"] == 1, logged[-1]
    assert logged[-1]["place_right"] > 2 * logged[0]["place_right"], logged[-1]
    for name in ("latents_error", "alone_error", "cover_error"):
        assert logged[-1][name] < 0.5 * logged[0][name], logged[-1]
    scores = part.score()
    assert scores["found"] < 0.5  # of pictures it has not seen: 1 of 32 by chance
    errors = {f"{name}_error" for name in ("surface", "latents", "things", "alone", "cover")}
    rights = {f"{name}_right" for name in ("place", *dense.OF_A_THING, *dense.OF_A_SCENE)}
    assert set(scores) == {"found", "psnr_db"} | errors | rights
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


def test_sigmoid_loss_is_siglips():
    """Equation 1 of Zhai et al., written out pair by pair."""
    part = object.__new__(semantic_encoder.Contrastive)
    torch.manual_seed(0)
    part.module = semantic_encoder.TwoTowers(50)
    batch = {
        "levels": torch.randint(256, (3, 128, 128, 3), dtype=torch.uint8),
        "latents": torch.zeros(3, 64, 64),
        "alone_latents": torch.zeros(3, 64, 64),
        "cover": torch.full((3, 64, 64), 8, dtype=torch.uint8),
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
    # Not of item 0: tokens that were learned from few texts are short, and the end of its long prompt has no room.
    assert part.text.t5_tokenizer.decode(batch["t5_ids"][0], skip_special_tokens=True) == base.what_is_said(
        make_item(base.TASKS[4], 4)
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


def test_redux_goes_on_from_a_whole_model(parts, tmp_path):
    """With its DiT and its connector, and from pictures alone where no share is words'."""
    shutil.copytree(parts, tmp_path, dirs_exist_ok=True)
    own = ROOT / "weights" / "tiny" / "words"
    make_part(part_config("semantic_encoder", tmp_path, own, tmp_path)).export(tmp_path / "semantic_encoder" / "model")
    changes = f"start={tiny.PACKAGED}", "words_share=0", "num_items=8"
    part = make_part(part_config("redux", tmp_path / "redux", own, tmp_path, *changes))
    model = load_denoiser(tiny.PACKAGED, dtype=torch.float32)
    for name in ("denoiser", "siglip_projector"):
        theirs = dict(getattr(model, name).named_parameters())
        learning = dict(getattr(part.module, name).named_parameters())
        assert all(p.requires_grad and torch.equal(p, theirs[key]) for key, p in learning.items())
        assert learning.keys() == theirs.keys()
    logged = overfit(part, part.make(range(4)), num_steps=10, lr=1e-3)
    assert all(more.keys() == {"pictures"} for _, more in logged)
    part.export(tmp_path / "made")
    written = load_file(tmp_path / "made" / "siglip_projector.safetensors")
    named = {f"denoise_tower.siglip_projector.{k}": p for k, p in part.module.siglip_projector.named_parameters()}
    assert written.keys() == named.keys() and all(torch.equal(written[name], p) for name, p in named.items())
    with pytest.raises(ValueError, match=r"words_share=1.0: must be at least 0 and below 1"):
        part_config("redux", tmp_path, own, tmp_path, "words_share=1.0")


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
    """A later turn of a talk has the earlier ones before it, and the picture behind it."""
    talk = next(i for i in (make_item("understanding", s, size_px=64) for s in range(50)) if len(i.conversations) >= 4)
    prompt, pictures = task_head.asked_at(talk, 1)
    first, answer, second = (turn["value"].replace("<image>", "").strip() for turn in talk.conversations[:3])
    assert prompt == (
        f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        f"<|im_start|>user\n{second}<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(pictures) == 1
    edit = make_item("edit", 3, size_px=64)
    prompt, pictures = task_head.asked_at(edit, 0)
    assert len(pictures) == 1 and np.array_equal(np.asarray(pictures[0]), edit.pictures[0])


def test_kept_items_are_made_once():
    made = []

    def make(numbers):
        made.extend(numbers)
        return {"n": torch.tensor(numbers), "square": torch.tensor([[n * n] for n in numbers])}

    items = KeptItems(5)
    assert items.take(range(2, 5), make)["n"].tolist() == [2, 3, 4]
    again = items.take(range(8, 12), make)  # counted round: 3, 4, 0, 1
    assert again["n"].tolist() == [3, 4, 0, 1] and again["square"].tolist() == [[9], [16], [0], [1]]
    assert made == [2, 3, 4, 0, 1]


def test_places_start_as_waves():
    """The products of two rows depend on how far apart they are, and are largest for a place with itself."""
    waves = semantic_encoder.place_waves(4, 16)
    products = (waves @ waves.T).view(4, 4, 4, 4)
    assert waves.shape == (16, 16)
    assert torch.equal(products.flatten(2).argmax(-1).flatten(), torch.arange(16))
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[0, 0, 0, 0], torch.tensor(8.0))
