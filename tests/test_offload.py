"""Weights that wait in host memory: the same bits, and on the device no more than is stated."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from uniworld.checkpoint.load import load_uniworld
from uniworld.checkpoint.tiny import random_tiny_dir
from uniworld.engine import Engine
from uniworld.engine.offload import GROUPS, LEVELS, Stream, Turns, place, weight_bytes, weights_of
from uniworld.engine.quantize import quantized_copy
from uniworld.models.flux import FluxConfig, FluxTransformer

CAT = Path(__file__).resolve().parent.parent / "examples" / "cat.jpg"
CPU, META = torch.device("cpu"), torch.device("meta")
FAST = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 3}
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def drawn():
    return Engine.from_pretrained("tiny", device="cpu", progress=False).generate("a cat", true_cfg_scale=2.0, **FAST)


@pytest.mark.parametrize("level", LEVELS)
def test_the_bits_are_those_without(level, drawn):
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, offload=level)
    for _ in range(2):  # the second request finds other weights in the slots than the first
        result = engine.generate("a cat", true_cfg_scale=2.0, **FAST)
        assert torch.equal(result.latents, drawn.latents)
        assert result.images[0].tobytes() == drawn.images[0].tobytes()
    assert set(result.timings) == set(drawn.timings)


def test_chat_moves_parts_back_and_forth():
    plain = Engine.from_pretrained("tiny", device="cpu", progress=False)
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False, offload="cpu")
    question = [{"role": "user", "content": "what is this?"}]
    for mode in ("text", "image", "text"):
        settings = FAST if mode == "image" else {"max_new_tokens": 4, "seed": 1}
        reply, expected = (e.chat(question, mode=mode, **settings) for e in (engine, plain))
        assert reply.text == expected.text and len(reply.images) == len(expected.images)


def test_quantized_blocks_take_turns_too():
    kept, moved = (
        Engine.from_pretrained("tiny", device="cpu", progress=False, quantize="fp8", offload=level)
        for level in (None, "cpu")
    )
    assert torch.equal(kept.generate("a cat", **FAST).latents, moved.generate("a cat", **FAST).latents)


class Fails(nn.Linear):
    def forward(self, x):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("num_modules", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_any_number_of_modules(num_modules):
    """Passes in order, a pass that stops early and one that fails: each module always sees its own weights."""
    torch.manual_seed(0)
    modules = [nn.Linear(8 + 8 * (i % 2), 8 + 8 * ((i + 1) % 2)) for i in range(num_modules)]
    weights = [module.weight.clone() for module in modules]
    inputs = [torch.randn(3, module.in_features) for module in modules]
    expected = [module(x) for module, x in zip(modules, inputs)]
    stream = Stream(Turns(modules, []), CPU)
    for stop in (num_modules, num_modules, num_modules // 2, num_modules):
        for i in range(stop):
            assert torch.equal(modules[i](inputs[i]), expected[i])
    modules[-1].__class__ = Fails
    with pytest.raises(RuntimeError, match="in the middle"):
        modules[-1](inputs[-1])
    modules[-1].__class__ = nn.Linear
    assert torch.equal(modules[0](inputs[0]), expected[0])
    slots = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    assert {module.weight.untyped_storage().data_ptr() for module in modules} == slots
    assert len(slots) == min(2, num_modules)
    assert all(weight.nbytes <= stream.slots[0].nbytes for weight in weights)


def storages(tensors, device):
    """Bytes of the distinct memory behind tensors of one device."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device == device}
    return sum(found.values())


def all_parameters(model):
    parts = ("vlm", "semantic_encoder", "text_encoders", "denoise_projector", "siglip_projector", "vae_projector")
    modules = [getattr(model, name) for name in (*parts, "vae", "denoiser", "task_head")]
    return [p for module in modules if module is not None for p in module.parameters()]


@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("level", ["parts", "cpu"])
def test_no_more_is_on_the_device_than_stated(level, quantize):
    """The device is meta here: what has memory there is counted by its storages."""
    model = load_uniworld("tiny", device="cpu", progress=False)
    total = storages(all_parameters(model), CPU)
    assert weight_bytes(model, None)["denoise"] == total
    if quantize:
        model.denoiser = quantized_copy(model.denoiser, quantize)
    stated = weight_bytes(model, level)
    model.task_head.to(META)
    model.device = META
    parts = place(model, level)
    assert weight_bytes(model, level) == stated  # also once it is placed
    for group in (*GROUPS, "vlm", "decode", "denoise"):
        parts.bring(group)
        assert storages(all_parameters(model), META) == stated[group], group
    assert stated["denoise"] < stated["vlm"] < total


def test_each_level_needs_less():
    model = load_uniworld("tiny", device="cpu", progress=False)
    peaks = []
    for level in (None, *LEVELS):
        stated = weight_bytes(model, level)
        peaks.append(max(stated[group] for group in GROUPS))
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    assert weight_bytes(model, None)["host"] == 0


def test_modulation_leaves_the_device():
    """At every level the table's linears share two slots; at the lowest nothing else moves."""
    model = load_uniworld("tiny", device="cpu", progress=False)
    before = weight_bytes(model, None)["denoise"]
    linears = model.denoiser.modulation_linears()
    table = sum(p.nbytes for linear in linears for p in linear.parameters())
    largest = max(sum(-(-p.nbytes // 256) * 256 for p in linear.parameters()) for linear in linears)
    assert weight_bytes(model, "modulation")["denoise"] == before - table + 2 * largest
    assert place(model, "modulation") is None
    assert storages([p for linear in linears for p in linear.parameters()], CPU) == 2 * largest


def test_tied_weights_move_as_one():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    (weight,) = weights_of([first, second])
    weight.put(torch.ones(4, 4))
    assert first.weight is second.weight and first.weight.sum() == 16


def test_an_edit_brings_one_part_after_the_other(monkeypatch):
    """No two of them are on the device: each bring takes the one before away."""
    engine = Engine.from_pretrained(
        str(random_tiny_dir()), dtype="float32", device="cpu", progress=False, offload="parts"
    )
    brought, bring = [], engine._parts.bring
    monkeypatch.setattr(engine._parts, "bring", lambda group: (brought.append(group), bring(group)))
    engine.edit(CAT, "make it snow", **FAST)
    assert brought == ["vlm", "semantic_encoder", "text_encoders", "connectors", "denoise", "decode"]


def flux(dim_heads: int) -> FluxTransformer:
    """A DiT whose weights, some hundred MB in bf16, are most of what is allocated."""
    config = FluxConfig(num_layers=5, num_single_layers=7, num_attention_heads=dim_heads, joint_attention_dim=256)
    return FluxTransformer(config).bfloat16().eval().requires_grad_(False)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@torch.inference_mode()
def test_peak_on_a_gpu():
    """Streaming saves what it says and keeps the bits: copies and kernels stay out of each other's way."""
    torch.manual_seed(0)
    model = flux(8).cuda()
    config = model.config
    inputs = {
        "img": torch.randn(1, 256, config.in_channels, device="cuda", dtype=torch.bfloat16),
        "txt": torch.randn(1, 64, config.joint_attention_dim, device="cuda", dtype=torch.bfloat16),
        "pooled": torch.randn(1, config.pooled_projection_dim, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device="cuda", dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)).cuda(),
    }
    expected, peak = run_and_measure(model, inputs)
    turns = [
        Turns(model.modulation_linears(), []),
        Turns(list(model.transformer_blocks), model.modulation_linears()),
        Turns(list(model.single_transformer_blocks), model.modulation_linears()),
    ]
    gc.collect()
    before = torch.cuda.memory_allocated()
    streams = [Stream(each, torch.device("cuda")) for each in turns]
    saved = before - torch.cuda.memory_allocated()
    whole = sum(w.value.nbytes for each in turns for i in range(len(each.modules)) for w in each.weights(i))
    assert saved >= whole - sum(slot.nbytes for stream in streams for slot in stream.slots) - 2**20
    for _ in range(5):
        result, streamed_peak = run_and_measure(model, inputs)
        assert torch.equal(result, expected)
    assert streamed_peak <= peak - saved + 2**20


def run_and_measure(model, inputs):
    model(**inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = model(**inputs)
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("level", [None, *LEVELS])
def test_a_loaded_model_leaves_the_gpu_as_stated(level):
    gc.collect()  # engines of other tests, which would leave in between
    before = torch.cuda.memory_allocated()
    model = load_uniworld("tiny", device="cuda", progress=False)
    stated = weight_bytes(model, level)["denoise"]
    engine = Engine(model, offload=level)
    held = torch.cuda.memory_allocated() - before
    buffers = 2**20  # and what rounding up to 512 bytes adds to some hundred small tensors
    assert stated <= held <= stated + buffers
    assert engine.model is model  # alive until here


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("level", LEVELS)
def test_the_engine_on_a_gpu(level):
    plain = Engine.from_pretrained("tiny", device="cuda", progress=False).generate("a cat", **FAST)
    engine = Engine.from_pretrained("tiny", device="cuda", progress=False, offload=level)
    for _ in range(2):
        assert torch.equal(engine.generate("a cat", **FAST).latents, plain.latents)
