"""The DiT in FP8 and NF4: against diffusers' model with the same rounding put around its linears, and the engine."""

import importlib.util

import pytest
import torch
from test_flux import make_inputs, make_pair, run_theirs
from torch import nn

from uniworld.checkpoint.tiny import random_tiny_dir
from uniworld.engine import Engine
from uniworld.engine import quantize as quantize_module
from uniworld.engine.quantize import check_quantize, fits, quantizable, quantized_copy
from uniworld.engine.step_errors import StepErrors
from uniworld.models import quantized
from uniworld.models.quantized import Fp8Linear, Nf4Linear

CPU = torch.device("cpu")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
FAST = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3}


def relative_error(result, truth):
    return float((result.double() - truth.double()).norm() / truth.double().norm())


def round_rows(x):
    """Every row to the nearest e4m3 numbers of its scale, and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class RoundedLinear(nn.Linear):
    """A linear of diffusers whose input and weight rows are rounded."""

    def forward(self, x):
        return nn.functional.linear(round_rows(x), round_rows(self.weight), self.bias)


def round_theirs(theirs, left_alone):
    """Put the rounding around the linears of the blocks; `left_alone` is asked with diffusers' names."""
    for name, module in theirs.named_modules():
        in_block = "transformer_blocks." in name and ".norm" not in name
        if isinstance(module, nn.Linear) and in_block and not left_alone(name):
            module.__class__ = RoundedLinear


EXCLUSIONS = {
    "nothing": ((), lambda name: False),
    "qkv": (("*.to_qkv.weight",), lambda name: name.endswith((".to_q", ".to_k", ".to_v"))),
    "single_mlp": (("*.proj_mlp.weight",), lambda name: name.endswith(".proj_mlp")),
    "single_out": (("*blocks.?.proj_out.weight",), lambda name: name.endswith(".proj_out")),
    "first_mlp": (("*.net.0.proj.weight",), lambda name: name.endswith(".net.0.proj")),
    "second_mlp": (("*.ff.net.2.*",), lambda name: name.endswith(".ff.net.2")),
    "attention_out": (
        ("*.to_out.0.weight", "*.to_add_out.weight"),
        lambda name: name.endswith((".to_out.0", ".to_add_out")),
    ),
    "doubles": (("transformer_blocks.*",), lambda name: name.startswith("transformer_blocks.")),
}


@pytest.mark.parametrize("name", EXCLUSIONS)
@torch.no_grad()
def test_fp8_is_the_model_with_rounded_rows(name):
    exclude, left_alone = EXCLUSIONS[name]
    theirs, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    exact = run_theirs(theirs, inputs)
    round_theirs(theirs, left_alone)
    rounded = run_theirs(theirs, inputs)
    result = quantized_copy(ours, "fp8", exclude=exclude)(**inputs)
    # A sum in another order moves a few values across the middle between two e4m3 numbers.
    cost = relative_error(rounded, exact)
    assert 5e-3 < cost < 0.1
    assert relative_error(result, rounded) < 0.25 * cost
    assert relative_error(result, exact) < 1.1 * cost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_error_is_bounded(dtype):
    """Against fp64, for the whole model at the head size of FLUX, with padded text."""
    _, exact = make_pair("head_128", torch.float64)
    _, ours = make_pair("head_128", dtype)
    inputs = make_inputs(ours.config, dtype) | {"txt_lengths": (11, 7)}
    truth = exact(**{k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()})
    plain = relative_error(ours(**inputs), truth)
    error = relative_error(quantized_copy(ours, "fp8")(**inputs), truth)
    assert plain < error < 0.06


@torch.no_grad()
def test_only_the_large_linears_of_blocks_change():
    _, ours = make_pair("guided", torch.float32)
    made = quantized_copy(ours, "fp8")
    changed = {name for name, module in made.named_modules() if isinstance(module, Fp8Linear)}
    joint = {f"single_transformer_blocks.{i}.joint" for i in range(3)}
    assert changed == quantizable(ours).keys() | joint and len(changed) == 2 * 8 + 3 * (3 + 1)
    before = dict(ours.named_parameters())
    for name, parameter in made.named_parameters():
        owner = name.rpartition(".")[0]
        assert (owner in changed) or parameter is before[name], name
    kept = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out", "transformer_blocks.0.norm1.linear")
    assert all(isinstance(made.get_submodule(name), nn.Linear) for name in kept)
    assert not any(isinstance(module, Fp8Linear) for module in ours.modules())
    weight, scale = made.transformer_blocks[0].attn.to_qkv.weight, made.transformer_blocks[0].attn.to_qkv.weight_scale
    assert weight.dtype == torch.float8_e4m3fn and weight.nbytes == 3 * 64 * 64 and scale.shape == (3 * 64, 1)


@torch.no_grad()
def test_a_single_blocks_input_is_read_by_one_product(monkeypatch):
    """Of 7 D columns, whose weights are named once; one that an excluded weight reads is read by two."""
    _, ours = make_pair("guided", torch.float32)
    inputs, dim = make_inputs(ours.config, torch.float32), ours.config.dim
    made, apart = (quantized_copy(ours, "fp8") for _ in range(2))
    weights = {name: p.shape for name, p in made.named_parameters() if name.startswith("single_transformer_blocks.0.")}
    readers = {name: shape for name, shape in weights.items() if "norm" not in name and "proj_out" not in name}
    assert set(readers) == {f"single_transformer_blocks.0.joint.{name}" for name in ("weight", "weight_scale", "bias")}
    assert readers["single_transformer_blocks.0.joint.weight"] == (7 * dim, dim)
    for block in apart.single_transformer_blocks:  # rows of the joint weight remain linears of their own
        block.joint = None
    torch.testing.assert_close(made(**inputs), apart(**inputs), rtol=1e-3, atol=1e-3)

    columns, multiply = [], quantized.fp8_linear

    def counted(x, x_scale, weight, *rest):
        columns.append(len(weight))
        return multiply(x, x_scale, weight, *rest)

    monkeypatch.setattr(quantized, "fp8_linear", counted)
    made(**inputs)
    assert columns[-6:] == [7 * dim, dim] * 3
    some = quantized_copy(ours, "fp8", exclude=["single_transformer_blocks.2.proj_mlp.weight"])
    columns.clear()
    some(**inputs)
    assert columns[-6:] == [7 * dim, dim, 7 * dim, dim, 3 * dim, dim]
    assert some.single_transformer_blocks[2].joint is None


@torch.no_grad()
def test_everything_excluded_changes_no_bit():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    assert torch.equal(quantized_copy(ours, "fp8", exclude=["*"])(**inputs), ours(**inputs))


@torch.no_grad()
def test_linears_of_other_sizes_stay():
    """FP8 wants multiples of 16, NF4 rows of whole blocks of 64."""
    assert fits(nn.Linear(16, 48), "fp8") and not fits(nn.Linear(16, 24), "fp8") and not fits(nn.Linear(24, 16), "fp8")
    assert fits(nn.Linear(64, 3), "nf4") and not fits(nn.Linear(96, 64), "nf4")
    _, ours = make_pair("guided", torch.float32)
    ours.transformer_blocks[0].attn.to_add_out = nn.Linear(64, 24)
    made = quantized_copy(ours, "fp8")
    assert type(made.transformer_blocks[0].attn.to_add_out) is nn.Linear
    assert type(made.transformer_blocks[1].attn.to_add_out) is Fp8Linear


@torch.no_grad()
def test_compiles_without_graph_break():
    torch._dynamo.reset()
    _, ours = make_pair("one_each", torch.float32)
    made, inputs = quantized_copy(ours, "fp8"), make_inputs(ours.config, torch.float32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), made(**inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_step_errors_are_relative_norms():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    table = ours.modulation(inputs["timestep"], inputs["guidance"], inputs["pooled"])
    arguments = (inputs["img"], ours.embed_txt(inputs["txt"]), table, ours.rope(inputs["img_ids"]), None)
    truth = ours.denoise(*arguments)
    off = truth.clone()
    off[0] *= 1.25
    errors = StepErrors(ours).measure(off, *arguments)
    torch.testing.assert_close(errors, torch.tensor([0.25, 0.0]))


def test_the_engine_reports_the_error_of_every_step():
    engine = Engine.from_pretrained("tiny", progress=False, quantize="fp8", report_error=True)
    result = engine.generate("a cat", **FAST)
    assert len(result.step_errors) == 3
    assert all(1e-4 < error < 0.15 for error in result.step_errors)
    plain = Engine.from_pretrained("tiny", progress=False).generate("a cat", **FAST)
    assert plain.step_errors == []
    assert 0 < relative_error(result.latents, plain.latents) < 0.2
    same = Engine.from_pretrained("tiny", progress=False, quantize="fp8", quantize_exclude=["*"], report_error=True)
    excluded = same.generate("a cat", **FAST)
    assert excluded.step_errors == [0.0] * 3 and torch.equal(excluded.latents, plain.latents)


def test_the_engine_reports_the_error_of_a_step_cache_without_quantization():
    engine = Engine.from_pretrained("tiny", progress=False, device="cpu", report_error=True)
    assert engine.generate("a cat", **FAST).step_errors == []
    result = engine.generate("a cat", **FAST, cache="taylor", cache_order=0)
    assert result.step_cache.computed == (True, False, False)
    assert result.step_errors[0] == 0 < min(result.step_errors[1:])


def test_fp8_batches_equal_single_requests():
    from uniworld.engine import Request

    engine = Engine.from_pretrained(str(random_tiny_dir()), progress=False, dtype="float32", quantize="fp8")
    settings = {"num_inference_steps": 1, "height": 64, "width": 64}
    requests = [Request(prompt=word, seed=i, **settings) for i, word in enumerate(("a", "a much longer prompt"))]
    for request, together in zip(requests, engine.run(requests)):
        alone = engine.run([request])[0]
        assert relative_error(together.latents, alone.latents) < 5e-3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantize": "int8"}, "^quantize='int8': must be one of fp8, nf4"),
        ({"quantize_exclude": ["*"]}, "^quantize_exclude=.*only has an effect with quantize"),
        ({"quantize": "fp8", "quantize_exclude": ["blocks.*"]}, "^quantize_exclude='blocks.*matches no weight"),
        ({"quantize": "fp8", "dtype": "float64"}, "^dtype=float64: must be bfloat16 or float32 with quantize"),
        ({"offload": "disk"}, "^offload='disk': must be one of auto, modulation, parts, cpu"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained("tiny", device="cpu", progress=False, **settings)


def test_devices_that_cannot(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with pytest.raises(ValueError, match="^quantize='fp8': NVIDIA A10 is sm_86; e4m3 needs sm_89 or newer"):
        check_quantize("fp8", cuda, torch.bfloat16)
    with pytest.raises(ValueError, match="^dtype=float32: must be bfloat16 with quantize='fp8'"):
        check_quantize("fp8", cuda, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_quantize("fp8", cuda, torch.bfloat16)
    monkeypatch.setattr(quantize_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^quantize='nf4': bitsandbytes is missing; pip install"):
        check_quantize("nf4", cuda, torch.bfloat16)


NF4_LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


@needs_bitsandbytes
@torch.no_grad()
def test_nf4_takes_the_nearest_of_its_levels():
    torch.manual_seed(0)
    linear = nn.Linear(128, 32)
    made = Nf4Linear(128, 32, torch.float32, "cpu")
    made.fill(linear.weight, linear.bias)
    assert made.weight.nbytes == 128 * 32 // 2 and made.absmax.numel() == 128 * 32 // 64
    blocks = linear.weight.double().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    nearest = levels[((blocks / scale)[..., None] - levels).abs().argmin(-1)] * scale
    torch.testing.assert_close(made.dense_weight().double(), nearest.view(32, 128), rtol=0, atol=1e-6)
    x = torch.randn(3, 5, 128)
    torch.testing.assert_close(made(x), nn.functional.linear(x, nearest.view(32, 128).float(), linear.bias))


@needs_bitsandbytes
@torch.no_grad()
def test_nf4_is_the_model_with_unpacked_weights():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    exact, made = ours(**inputs), quantized_copy(ours, "nf4", exclude=["*.to_add_out.weight"])
    changed = [name for name, module in made.named_modules() if isinstance(module, Nf4Linear)]
    assert len(changed) == len(quantizable(ours)) - 2
    result = made(**inputs)
    for name in changed:
        ours.get_submodule(name).weight.copy_(made.get_submodule(name).dense_weight())
    torch.testing.assert_close(result, ours(**inputs), rtol=1e-5, atol=1e-5)
    assert 0.01 < relative_error(result, exact) < 0.5


@needs_bitsandbytes
def test_the_engine_draws_in_nf4():
    engine = Engine.from_pretrained("tiny", progress=False, quantize="nf4", offload="cpu", report_error=True)
    result = engine.generate("a cat", **FAST)
    assert len(result.images) == 1 and all(1e-4 < error < 0.5 for error in result.step_errors)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs sm_89 or newer"
)
@torch.no_grad()
def test_fp8_on_a_gpu_agrees_with_the_reference():
    _, ours = make_pair("head_128", torch.bfloat16)
    made, inputs = quantized_copy(ours, "fp8"), make_inputs(ours.config, torch.bfloat16)
    expected = made(**inputs)
    exact = ours(**inputs)
    on_gpu = quantized_copy(ours.cuda(), "fp8")
    result = on_gpu(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}).cpu()
    assert relative_error(result, exact) < 1.2 * relative_error(expected, exact)


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_nf4_on_a_gpu_unpacks_the_same_weights():
    linear = nn.Linear(256, 128).bfloat16()
    here = Nf4Linear(256, 128, torch.bfloat16, "cpu")
    there = Nf4Linear(256, 128, torch.bfloat16, "cuda")
    here.fill(linear.weight, linear.bias)
    there.fill(linear.weight.cuda(), linear.bias)
    apart = (there.dense_weight().cpu() - here.dense_weight()).abs() > 1e-3
    assert apart.float().mean() < 1e-3  # a weight in the middle between two levels may go either way
