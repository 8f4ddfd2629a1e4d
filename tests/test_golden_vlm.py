"""The VLM against the authors' code: logits, states, positions, greedy text; and its promises on padding and caches."""

import json

import pytest
import torch
from golden import ROOT, case, cases, close, images, qwen_dir, resolve, univa_dir
from safetensors.torch import load_file

from uniworld.checkpoint.names import VLM, place
from uniworld.models.prompts import PromptProcessor, TokenIds, VLMInputs, chat_text
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import AREA_PX, VisionProcessor
from uniworld.models.vlm import Sampler, VisionLanguageModel, qwen_config, rope_index

PASSES = [c["name"] for c in cases("a_lvlm") if c["name"] != "generate_greedy_text"]


def load_vlm(folder, attention="sdpa"):
    """Built on meta and filled by assignment, as checkpoint loading may do."""
    with torch.device("meta"):
        vlm = VisionLanguageModel.from_config(json.loads((folder / "config.json").read_text()), attention)
    weights = {place(k): v for k, v in load_file(folder / "model.safetensors").items()}
    weights = {target.name: v for target, v in weights.items() if target.part == VLM}
    vlm.model.load_state_dict(weights, assign=True)
    vlm.restore_buffers("cpu")
    return vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return univa_dir(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder)


@pytest.fixture(scope="module")
def processor():
    tokenizer = load_tokenizer(ROOT / "univa", "Qwen2Tokenizer")
    config = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())
    return PromptProcessor(tokenizer, VisionProcessor(config, min_pixels=56 * 56, max_pixels=AREA_PX))


def golden_inputs(processor, inputs):
    return VLMInputs.from_ids(
        inputs["input_ids"],
        inputs["attention_mask"],
        processor.tokens,
        inputs.get("pixel_values"),
        inputs.get("image_grid_thw"),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PASSES)
def test_pass(folder, processor, name, attention):
    vlm = load_vlm(folder, attention)
    inputs, outputs = resolve(case("a_lvlm", name))
    states = vlm.encode(golden_inputs(processor, inputs))
    mask = inputs["attention_mask"].bool()
    assert torch.equal(states.position_ids[:, mask], outputs["position_ids"][:, mask])
    assert torch.equal(states.rope_deltas, outputs["rope_deltas"])
    ok, worst = close(states.hidden_states, outputs["last_hidden_state"], mask=mask)
    assert ok, worst
    ok, worst = close(vlm.logits(states.hidden_states), outputs["logits"], mask=mask)
    assert ok, worst
    assert states.past_key_values is None


def test_vision_tower(vlm):
    inputs, outputs = resolve(case("s_encoders", "qwen_vision"))
    features = vlm.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    ok, worst = close(torch.cat(features.pooler_output), outputs["image_embeds"])
    assert ok, worst


def test_greedy_text(vlm, processor):
    inputs, outputs = resolve(case("a_lvlm", "generate_greedy_text"))
    expected = outputs["sequences"][0, inputs["input_ids"].shape[1] :].tolist()
    states = vlm.encode(golden_inputs(processor, inputs), use_cache=True)
    num_tokens = inputs["max_new_tokens"]
    assert list(vlm.stream_text(states, max_new_tokens=num_tokens)) == expected
    # the cache of the pass is not spent
    assert list(vlm.stream_text(states, max_new_tokens=num_tokens)) == expected
    stop = expected.index(264)
    assert list(vlm.stream_text(states, max_new_tokens=num_tokens, stop_ids={264})) == expected[:stop]


def test_text_is_written_from_the_pass_without_another(vlm, processor, monkeypatch):
    states = vlm.encode(processor.encode([chat_text("describe it", 1)], [images()[:1]]), use_cache=True)
    lengths = []
    forward = vlm.model.model.forward

    def counting(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(vlm.model.model, "forward", counting)
    assert len(list(vlm.stream_text(states, max_new_tokens=4))) == 4
    assert lengths == [1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_each_alone(vlm, processor, side):
    """States and text of padded prompts with and without images; text is checked against a full pass a token."""
    A, B, C = images()
    prompts = [chat_text("what changed between these", 2), chat_text("a cat"), chat_text("describe the picture", 1)]
    pictures = [[A, C], [], [B]]
    padded = PromptProcessor(processor.tokenizer, processor.vision, padding_side=side)
    batch = padded.encode(prompts, pictures)
    states = vlm.encode(batch, use_cache=True)
    for row, (prompt, of_prompt) in enumerate(zip(prompts, pictures)):
        single = processor.encode([prompt], [of_prompt])
        alone = vlm.encode(single)
        ok, worst = close(
            states.hidden_states[row, batch.attention_mask[row].bool()], alone.hidden_states[0], atol=1e-5
        )
        assert ok, worst
        written = list(vlm.stream_text(states, row, max_new_tokens=6))
        assert written == full_pass_text(vlm, processor.tokens, single, 6)


def full_pass_text(vlm, tokens: TokenIds, inputs: VLMInputs, num_tokens: int) -> list[int]:
    """Greedy text without any cache: the whole sequence again for every token."""
    ids = inputs.input_ids
    for _ in range(num_tokens):
        whole = VLMInputs.from_ids(ids, torch.ones_like(ids), tokens, inputs.pixel_values, inputs.image_grid_thw)
        token = vlm.logits(vlm.encode(whole).hidden_states[0, -1]).argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def test_seeded_text(vlm, processor):
    states = vlm.encode(processor.encode([chat_text("a cat")]), use_cache=True)
    draws = [list(vlm.stream_text(states, max_new_tokens=12, temperature=1.0, seed=s)) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    greedy = list(vlm.stream_text(states, max_new_tokens=12))
    assert list(vlm.stream_text(states, max_new_tokens=12, temperature=1.0, top_p=1e-6)) == greedy


def test_sampler_draws_by_probability():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    sampler = Sampler(temperature=0.5, top_p=1.0, seed=0)
    counts = torch.bincount(torch.tensor([sampler(probabilities.log()) for _ in range(8000)]), minlength=4) / 8000
    expected = probabilities**2 / (probabilities**2).sum()
    assert (counts - expected).abs().max() < 0.02
    sampler = Sampler(temperature=1.0, top_p=0.6, seed=0)
    assert {sampler(probabilities.log()) for _ in range(500)} == {1, 3}


def test_rope_index_against_transformers(vlm):
    """Random layouts: several images, images side by side, padding on either side."""
    generator = torch.Generator().manual_seed(0)

    def random(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    image_token = vlm.model.config.image_token_id
    for _ in range(40):
        rows, grids = [], []
        for _ in range(random(1, 4)):
            row = [1] * random(1, 6)
            for _ in range(random(0, 4)):
                grids.append([1, 2 * random(1, 5), 2 * random(1, 5)])
                row += [image_token] * (grids[-1][1] * grids[-1][2] // 4) + [1] * random(1, 4)
            rows.append(row)
        length, left = max(map(len, rows)), random(0, 2)
        pads = [[0] * (length - len(row)) for row in rows]
        ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, rows)])
        mask, types = (ids > 0).long(), (ids == image_token).long()
        grid = torch.tensor(grids) if grids else None
        position_ids, deltas = rope_index(types, mask, grid, vlm.merge_size)
        expected, _ = vlm.model.model.get_rope_index(ids, types, grid, attention_mask=mask)
        assert torch.equal(position_ids[:, mask.bool()], expected[:, mask.bool()])
        assert torch.equal(deltas[:, 0], expected.masked_fill(mask == 0, -1).amax((0, 2)) + 1 - length)


def test_rope_index_of_adjacent_images():
    types = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]])
    position_ids, _ = rope_index(types, torch.ones_like(types), torch.tensor([[1, 4, 4], [1, 2, 4]]), 2)
    assert position_ids[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 3, 5],
        [0, 1, 1, 2, 2, 3, 3, 5],
        [0, 1, 2, 1, 2, 3, 4, 5],
    ]


def test_config_of_both_layouts(folder, tmp_path):
    """The authors' flat config, the plain Qwen folder's, and the nested one that transformers 5 writes."""
    authors = qwen_config(json.loads((folder / "config.json").read_text()))
    qwen = qwen_config(json.loads((qwen_dir(tmp_path) / "config.json").read_text()))
    nested = qwen_config(authors.to_dict())
    assert authors.to_dict() == qwen.to_dict() == nested.to_dict()
    assert authors.text_config.hidden_size == 64 and authors.vision_config.hidden_size == 32
    assert authors.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert authors.text_config.rope_parameters["rope_theta"] == 1e6
    assert authors.text_config.rms_norm_eps == 1e-6 and not authors.tie_word_embeddings
    with pytest.raises(ValueError, match="mrope_section is missing"):
        qwen_config({"vision_config": {}, "hidden_size": 64})


def test_restored_buffers_equal_built_ones(folder):
    config = json.loads((folder / "config.json").read_text())
    built = dict(VisionLanguageModel.from_config(config).named_buffers())
    restored = dict(load_vlm(folder).named_buffers())
    assert built.keys() == restored.keys() and built
    for name, buffer in built.items():
        assert torch.equal(buffer, restored[name])


def test_mistakes_are_named(vlm, processor):
    states = vlm.encode(processor.encode([chat_text("a cat")]))
    with pytest.raises(ValueError, match="encode with use_cache=True"):
        vlm.stream_text(states)
    states = vlm.encode(processor.encode([chat_text("a cat")]), use_cache=True)
    for wrong, message in [
        ({"temperature": -1.0}, "temperature=-1.0: must be from 0 to 100"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            vlm.stream_text(states, **wrong)
