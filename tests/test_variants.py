"""VAE latents in place of semantic tokens, learned queries in place of VLM states: each against plain computations."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from uniworld.checkpoint.load import load_denoiser, load_uniworld
from uniworld.checkpoint.save import save_uniworld
from uniworld.config import TrainConfig, from_dict
from uniworld.data.batch import TrainBatch
from uniworld.engine import Engine
from uniworld.engine.request import Request
from uniworld.models.prompts import VLMInputs, chat_text, training_pieces
from uniworld.models.queries import LearnedQueries
from uniworld.models.vlm import rope_index
from uniworld.train import build
from uniworld.train.encode import Encoders
from uniworld.train.export import _write_model
from uniworld.train.precompute import precompute
from uniworld.train.stages import references_of
from uniworld.train.step import training_loss
from uniworld.train.variants import apply_variant

NUM = 5
FAST = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3}


def picture(colour: str, size: tuple[int, int] = (90, 60)) -> Image.Image:
    image = Image.new("RGB", size, colour)
    image.paste("white", (10, 10, 40, 30))
    return image


@pytest.fixture(scope="module")
def loaded():
    return load_uniworld(device="cpu", dtype="float32", progress=False)


@pytest.fixture
def model(loaded):
    """The model tiny; what a test sets or trains is undone."""
    before = dict(vars(loaded))
    yield loaded
    vars(loaded).update(before)
    for part in (loaded.denoiser, loaded.denoise_projector, loaded.siglip_projector, loaded.vae_projector):
        part.requires_grad_(False)


def config_of(preset="stage2", **sections) -> TrainConfig:
    return from_dict(TrainConfig, {"stage": {"preset": preset}, "sharding": {"dtype": "fp32"}, **sections})


def encoded_batch(model, config):
    """Two edits, of one picture and of two, with prompts of unequal length, as a run encodes them."""
    pictures = [[picture("red")], [picture("blue"), picture("green", (60, 90))]]
    words = ["make it a good deal brighter than it is", "mix"]
    prompts = [
        training_pieces([{"from": "human", "value": "<image>" * len(p) + w}, {"from": "gpt", "value": "<gen_image>"}])
        for p, w in zip(pictures, words)
    ]
    encoder = model.reference_encoder
    batch = TrainBatch(
        inputs=replaced_padding(model).encode(prompts, pictures),
        siglip_pixels=None if encoder is None else encoder.preprocess([p for own in pictures for p in own]),
        instructions=tuple(words),
        target=torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1,
        region_weight=None,
        sample_ids=("a", "b"),
    )
    encoders = Encoders(model, use_siglip=references_of(config) != "none", use_t5=False)
    return batch, pictures, encoders.encode(batch)


def replaced_padding(model):
    """The processor with padding on the left, as in training."""
    processor = copy.copy(model.processor)
    processor.padding_side = "left"
    return processor


# VAE latents


def plain_latents(model, images):
    """Packed means of the latents by diffusers and loops, [N, T, 4C]."""
    side = model.semantic_encoder.model.config.image_size
    resized = [image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in resized]) / 127.5 - 1
    with torch.no_grad():
        means = model.vae.model.encode(pixels).latent_dist.mean
    packed = []
    for mean in means:
        latents = (mean - model.vae.model.config.shift_factor) * model.vae.model.config.scaling_factor
        rows = [
            torch.stack([latents[c, 2 * y + dy, 2 * x + dx] for c in range(16) for dy in (0, 1) for dx in (0, 1)])
            for y in range(latents.shape[1] // 2)
            for x in range(latents.shape[2] // 2)
        ]
        packed.append(torch.stack(rows))
    return torch.stack(packed)


def through(connector, states):
    """A connector by plain torch."""
    first, _, second = connector
    return F.linear(F.silu(F.linear(states, first.weight, first.bias)), second.weight, second.bias)


def test_latents_stand_where_semantic_tokens_stood(model):
    config = config_of(model={"references": "vae"})
    apply_variant(config, model)
    batch, pictures, encoded = encoded_batch(model, config)
    latents = plain_latents(model, [p for own in pictures for p in own])
    assert latents.shape == (3, model.semantic_encoder.num_tokens, 64)
    torch.testing.assert_close(encoded.siglip_states, latents, atol=1e-5, rtol=1e-4)

    conditioning = build.build_train_model(config, model).condition(encoded)
    states, tokens = model.vlm.encode(batch.inputs).hidden_states, iter(through(model.vae_projector, latents))
    for b, mask in enumerate(batch.inputs.attention_mask.bool()):
        rows = []
        for column in mask.nonzero().flatten().tolist():
            if column in batch.inputs.image_end_positions[b]:
                rows.extend(next(tokens))
            rows.append(through(model.denoise_projector, states[b, column]))
        assert conditioning.txt_lengths[b] == len(rows)
        torch.testing.assert_close(conditioning.txt[b, : len(rows)], torch.stack(rows), atol=1e-4, rtol=1e-4)


def test_the_connector_of_latents_learns_and_that_of_semantic_tokens_does_not(model):
    config = config_of(model={"references": "vae"})
    apply_variant(config, model)
    train_model = build.build_train_model(config, model)
    _, _, encoded = encoded_batch(model, config)
    training_loss(train_model, encoded, config.flow, torch.Generator().manual_seed(0)).backward()
    gradients = {name: p.grad for name, p in train_model.named_parameters() if p.grad is not None}
    assert all(gradients[f"vae_projector.{i}.weight"].abs().max() > 0 for i in (0, 2))
    assert not any(name.startswith("siglip_projector") for name in gradients)
    for p in train_model.parameters():
        p.grad = None


@pytest.mark.parametrize("references", ["vae", "none", "siglip"])
def test_the_engine_conditions_as_training_does(model, references):
    """The same prompt and picture through `Conditioner` and through the trained module."""
    model.references = references
    conditioner = Engine(model).conditioner
    request = Request(prompt="make it blue", images=(picture("red"),), use_t5=False, **FAST)
    job = conditioner.tokenize(request)
    found = conditioner._condition(request, conditioner.read(job))
    num_tokens = model.semantic_encoder.num_tokens if references != "none" else 0
    assert found.txt_lengths == (job.input_ids.shape[1] + num_tokens,)
    if references == "vae":
        (end,) = job.image_end_positions[0]
        wanted = through(model.vae_projector, plain_latents(model, request.images)[0])
        torch.testing.assert_close(found.txt[0, end : end + num_tokens], wanted, atol=1e-4, rtol=1e-4)


# Learned queries


def with_queries(model):
    model.queries = LearnedQueries.fresh(NUM, model.vlm.model.get_input_embeddings().weight, seed=4)
    return model.queries


def plain_query_states(model, inputs: VLMInputs, weight):
    """One whole pass a prompt, without padding and cache, of a VLM whose vocabulary the queries were added to."""
    vlm = copy.deepcopy(model.vlm.model)
    vocabulary = vlm.get_input_embeddings().weight
    table = torch.cat([vocabulary, weight])
    embedding = nn.Embedding(*table.shape, _weight=table)
    embedding.weight.requires_grad_(True)
    vlm.model.language_model.embed_tokens = embedding
    ids = len(vocabulary) + torch.arange(len(weight))
    states, patches, images = [], 0, 0
    for row, mask in zip(inputs.input_ids, inputs.attention_mask.bool()):
        own = torch.cat([row[mask], ids])[None]
        types = (own == model.processor.tokens.image_pad).long()
        num_images = int((own == model.processor.tokens.vision_end).sum())
        grids = inputs.image_grid_thw[images : images + num_images]
        num_patches = int(grids.prod(1).sum())
        positions, _ = rope_index(types, torch.ones_like(own), grids, model.vlm.merge_size)
        output = vlm.model(
            input_ids=own,
            mm_token_type_ids=types,
            position_ids=positions,
            pixel_values=inputs.pixel_values[patches : patches + num_patches],
            image_grid_thw=grids,
        )
        states.append(output.last_hidden_state[0, -len(weight) :])
        patches, images = patches + num_patches, images + num_images
    return torch.stack(states), embedding.weight


@pytest.mark.parametrize("padding", ["left", "right"])
def test_states_of_queries_are_those_of_tokens_at_the_end_of_the_prompt(model, padding):
    queries = with_queries(model)
    queries.requires_grad_(True)
    processor = copy.copy(model.processor)
    processor.padding_side = padding
    images = [(picture("red"),), (picture("blue"), picture("green", (60, 90)))]
    inputs = processor.encode([chat_text("make it a good deal brighter", 1), chat_text("mix", 2)], images)
    assert not inputs.attention_mask.all()
    prompt = model.vlm.encode(inputs, use_cache=True)
    length = prompt.past_key_values.get_seq_length()
    found = queries(model.vlm.states_after, prompt)
    expected, table = plain_query_states(model, inputs, queries.weight.detach())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert prompt.past_key_values.get_seq_length() == length  # left as it was: text may go on from it

    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((found * upstream).sum(), queries.weight)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), table)
    error = (gradient - expected_gradient[-NUM:]).norm() / expected_gradient[-NUM:].norm()
    assert float(error) < 1e-4  # of trained weights some gradients are 10^5 times as large as others
    assert gradient.abs().max() > 0


def test_queries_alone_condition_the_dit_and_learn(model):
    config = config_of("stage2", model={"num_queries": NUM})
    apply_variant(config, model)
    batch, _, encoded = encoded_batch(model, config)
    train_model = build.build_train_model(config, model)
    conditioning = train_model.condition(encoded)
    num_tokens = model.semantic_encoder.num_tokens
    assert conditioning.txt_lengths == (NUM + num_tokens, NUM + 2 * num_tokens)
    states, _ = plain_query_states(model, batch.inputs, model.queries.weight.detach())
    semantic = through(model.siglip_projector, model.semantic_encoder(batch.siglip_pixels))
    first, second = through(model.denoise_projector, states)
    alone = [semantic[0], first]
    both = [semantic[1], second[:1], semantic[2], second[1:]]  # a picture before each of the first queries
    for b, rows in enumerate((alone, both)):
        wanted = torch.cat(rows)
        torch.testing.assert_close(conditioning.txt[b, : len(wanted)], wanted, atol=1e-4, rtol=1e-4)
    training_loss(train_model, encoded, config.flow, torch.Generator().manual_seed(0)).backward()
    assert model.queries.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.vlm.parameters())
    for p in train_model.parameters():
        p.grad = None


def test_the_engine_draws_with_queries_and_talks_as_before(model, monkeypatch):
    request = Request(prompt="make it blue", images=(picture("red"),), use_t5=False, **FAST)
    plain = Engine(model)
    messages = [{"role": "user", "content": "what is this?"}]
    said, drawn = plain.chat(messages, mode="text", max_new_tokens=6).text, plain.run([request])[0].latents
    queries = with_queries(model)
    engine = Engine(model)
    assert engine.chat(messages, mode="text", max_new_tokens=6).text == said
    assert not torch.allclose(engine.run([request])[0].latents, drawn, atol=1e-3)
    inputs = engine.conditioner.tokenize(request)
    found = engine.conditioner._condition(request, engine.conditioner.read(inputs))
    states, _ = plain_query_states(model, inputs, queries.weight)
    wanted = through(model.denoise_projector, states[0])
    torch.testing.assert_close(found.txt[0, -NUM:], wanted, atol=1e-4, rtol=1e-4)
    assert found.txt_lengths == (NUM + model.semantic_encoder.num_tokens,)
    with pytest.raises(ValueError, match=f"images: {NUM + 1} given, a model with {NUM} learned queries takes at most"):
        engine.edit([picture("red")] * (NUM + 1), "mix", **FAST)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("references", ["vae", "none"])
def test_on_a_gpu(model, references):
    """A request's conditioning with queries is that of the CPU."""
    on_gpu = load_uniworld(device="cuda", dtype="float32", progress=False)
    request = Request(prompt="make it blue", images=(picture("red"),), use_t5=False, **FAST)
    found = []
    for one in (model, on_gpu):
        with_queries(one)
        one.references = references
        conditioner = Engine(one).conditioner
        found.append(conditioner._condition(request, conditioner.read(conditioner.tokenize(request))).txt.cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-2, rtol=1e-2)  # TF32 may be on


# Saved, loaded, refused


def test_a_variant_is_saved_and_loaded(model, tmp_path):
    queries = with_queries(model)
    model.references = "vae"
    folder = save_uniworld(model, tmp_path / "out")
    parts = {"flux": model.folder / "flux", "siglip": model.folder / "siglip"}
    again = load_uniworld(folder, **parts, device="cpu", dtype="float32", progress=False)
    assert again.references == "vae" and again.queries.num == NUM
    assert torch.equal(again.queries.weight, queries.weight)
    assert load_denoiser(folder, device="cpu", dtype="float32", progress=False).queries.num == NUM
    request = Request(prompt="make it blue", images=(picture("red"),), use_t5=False, **FAST)
    assert torch.equal(Engine(again).run([request])[0].latents, Engine(model).run([request])[0].latents)

    config = json.loads((folder / "config.json").read_text())
    config["uniworld"]["references"] = "clip"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="uniworld.references='clip': must be one of siglip, vae, none"):
        load_uniworld(folder, **parts, progress=False)


def test_an_export_holds_queries_that_its_base_did_not_have(model, tmp_path):
    """And says what stood for reference pictures; what is written twice says it anew."""
    drawn = torch.randn(NUM, model.vlm.hidden_size).to(torch.bfloat16)
    for number, (preset, wanted) in enumerate({"stage1": "none", "stage2": "siglip"}.items()):
        base = "tiny" if number == 0 else str(tmp_path / "0")
        config = config_of(preset, model={"path": base, "num_queries": NUM})
        folder = tmp_path / str(number)
        folder.mkdir()
        _write_model(folder, config, {"denoise_tower.queries.weight": drawn.float}, {}, 10**9, False)
        again = load_uniworld(folder, device="cpu", dtype="float32", progress=False)
        assert torch.equal(again.queries.weight, drawn.float())
        assert again.references == wanted and not again.random_weights


def test_the_published_layout_stays_as_it_was(model, tmp_path):
    folder = save_uniworld(model, tmp_path / "out")
    assert "references" not in json.loads((folder / "config.json").read_text())["uniworld"]
    assert not any("queries" in key for key in load_file(folder / "model.safetensors"))


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="data.precomputed: model.references=vae and model.num_queries need live"):
        config_of(model={"references": "vae"}, data={"precomputed": "states"})
    with pytest.raises(ValueError, match="need live encoding"):
        precompute(config_of(model={"num_queries": 4}), tmp_path / "states")
    with pytest.raises(ValueError, match="model.num_queries=-1: must be at least 0"):
        config_of(model={"num_queries": -1})
    with_queries(model)
    with pytest.raises(ValueError, match=f"model.num_queries=0: tiny was trained with {NUM}"):
        apply_variant(config_of(), model)
    model.queries, model.vae_projector = None, None
    with pytest.raises(ValueError, match="model.references=vae: tiny has no vae_projector"):
        apply_variant(config_of(model={"references": "vae"}), model)


def test_what_a_run_inserts():
    assert references_of(config_of("stage1")) == "none"
    assert references_of(config_of("stage2")) == "siglip"
    assert references_of(config_of("stage2", stage={"preset": "stage2", "use_siglip": False})) == "none"
    assert references_of(config_of("stage1", model={"references": "vae"})) == "none"
    assert references_of(config_of("stage2", model={"references": "vae"})) == "vae"


def test_fresh_queries_vary_as_embeddings_do():
    embeddings = 0.3 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    queries = LearnedQueries.fresh(300, embeddings, seed=1)
    assert queries.weight.shape == (300, 40)
    assert queries.weight.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(queries.weight, LearnedQueries.fresh(300, embeddings, seed=1).weight)
    assert not torch.equal(queries.weight, LearnedQueries.fresh(300, embeddings, seed=2).weight)
