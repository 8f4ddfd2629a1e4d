"""LoRA in the engine against peft on diffusers' model with the same weights; fusing, unfusing, several at once."""

import sys
from pathlib import Path

import pytest
import torch
from denoise_jobs import FakeRecorder
from safetensors.torch import load_file, save_file
from test_lora import dit_inputs
from test_quantize import round_theirs
from train_fakes import FLUX, small_config, small_model

from uniworld.checkpoint.lora_files import find_file
from uniworld.checkpoint.names import diffusers_names
from uniworld.engine import Engine
from uniworld.engine.graphs import StepGraphs
from uniworld.engine.lora import AdaptedLinear, Loras
from uniworld.engine.quantize import quantized_copy
from uniworld.train import lora

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
try:
    from peers import diffusers_flux, run_diffusers
finally:
    sys.path.pop(0)

D = FLUX.dim
EVERY = (
    r"(x_embedder|context_embedder|proj_out|norm_out\.linear|time_text_embed\..*linear_[12]"
    r"|.*\.(norm1|norm1_context|norm)\.linear|.*\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|.*\.to_out\.0|.*\.net\.0\.proj|.*\.net\.2|.*\.proj_mlp|single_transformer_blocks\..*\.proj_out)"
)


def ours(dtype=torch.float64):
    return small_model(small_config()).denoiser.requires_grad_(False).to(dtype)


def theirs(dtype=torch.float64):
    return diffusers_flux(ours(dtype), "cpu")


def loras(denoiser):
    return Loras(denoiser, denoiser.x_embedder.weight.device, denoiser.x_embedder.weight.dtype)


def inputs(dtype=torch.float64):
    """Timestep and guidance are zero, whose embedding is exact: diffusers computes it in fp32 whatever the dtype."""
    img, txt, pooled, _, _, ids = dit_inputs(dtype)
    zeros = torch.zeros(len(img), dtype=dtype)
    return {"img": img, "txt": txt, "pooled": pooled, "timestep": zeros, "guidance": zeros, "img_ids": ids}


@torch.no_grad()
def predict(denoiser):
    like = denoiser.x_embedder.weight
    return denoiser(**{name: t.to(like.device) for name, t in inputs(like.dtype).items()})


@torch.no_grad()
def predict_theirs(model):
    return run_diffusers(model, **inputs(model.dtype))


@torch.no_grad()
def with_random_factors(model, seed=0, **config):
    """diffusers' model with an adapter of peft on every linear, or on those that `config` names."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": EVERY, "init_lora_weights": False} | config
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(**settings))
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.3)
    return model


def saved_by_diffusers(folder):
    model = with_random_factors(theirs(), alpha_pattern={"proj_mlp": 2, "transformer_blocks.1.attn.to_q": 9})
    model.save_lora_adapter(folder)
    return model, folder


def saved_by_peft(folder):
    config = peft.LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules=EVERY, init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(theirs(), config)
    model.save_pretrained(folder)
    return model.base_model.model, folder


def named_as_pipelines_do(folder):
    """`transformer.*`, without an alpha: the scale is 1."""
    model = with_random_factors(theirs(), lora_alpha=3)
    state = peft.get_peft_model_state_dict(model)
    path = folder / "style.safetensors"
    save_file({f"transformer.{key}": value.contiguous() for key, value in state.items()}, path)
    return model, path


def named_by_kohya(folder):
    """Names and alphas of kohya; diffusers' own conversion makes its adapter of all but the fused `linear1`."""
    from diffusers.loaders import FluxLoraLoaderMixin

    state, single, model = kohya_factors(("lora_unet_single_blocks_1_linear1",)), {}, theirs()
    for stem in [stem for stem in state if "linear1" in stem]:
        down, up, alpha = state[stem]
        update = alpha / len(down) * up @ down
        block = model.single_transformer_blocks[1]
        rows = update.split([D, D, D, 4 * D])
        for linear, part in zip((block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp), rows):
            linear.weight = torch.nn.Parameter(linear.weight + part)
        single |= {stem: state[stem]}
    rest = as_kohya_file({stem: value for stem, value in state.items() if stem not in single})
    converted = FluxLoraLoaderMixin.lora_state_dict(dict(rest))
    model.load_lora_adapter(
        {key.replace("transformer.", "", 1): value for key, value in converted.items()}, prefix=None
    )
    path = folder / "kohya.safetensors"
    save_file(as_kohya_file(state), path)
    return model, path


def kohya_factors(more=()):
    """{name: (down, up, alpha)} of every kind of linear that kohya's networks know, and of `more`."""
    sizes = {"img_attn_qkv": (D, 3 * D), "img_attn_proj": (D, D), "img_mlp_0": (D, 4 * D), "img_mlp_2": (4 * D, D)}
    sizes |= {"img_mod_lin": (D, 6 * D)}
    sizes |= {name.replace("img", "txt"): size for name, size in sizes.items()}
    sizes = {f"lora_unet_double_blocks_1_{name}": size for name, size in sizes.items()}
    sizes |= {"lora_unet_single_blocks_0_linear2": (5 * D, D), "lora_unet_single_blocks_1_modulation_lin": (D, 3 * D)}
    sizes |= {"lora_unet_img_in": (FLUX.in_channels, D), "lora_unet_txt_in": (FLUX.joint_attention_dim, D)}
    sizes |= {"lora_unet_time_in_in_layer": (256, D), "lora_unet_vector_in_out_layer": (D, D)}
    sizes |= {"lora_unet_guidance_in_in_layer": (256, D)}
    sizes |= dict.fromkeys(more, (D, 7 * D))
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)

    return {stem: (random(4, n_in), random(n_out, 4), 2.0) for stem, (n_in, n_out) in sizes.items()}


def as_kohya_file(factors):
    tensors = {}
    for stem, (down, up, alpha) in factors.items():
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def exported_here(folder):
    """What `uniworld export` writes of factors that our trainer made."""
    model = small_model(small_config()).requires_grad_(False).double()
    lora.add_lora(model.denoiser, 3)
    torch.manual_seed(5)
    factors = dict(model.named_parameters())
    with torch.no_grad():
        for name in filter(lora.is_factor, factors):
            factors[name].copy_(0.3 * torch.randn(factors[name].shape, dtype=torch.float64))
    save_file(
        {key: t.detach() for key, t in lora.diffusers_adapter(factors, factors).items()}, folder / "lora.safetensors"
    )
    return model.denoiser, folder


SOURCES = (exported_here, saved_by_diffusers, saved_by_peft, named_as_pipelines_do, named_by_kohya)


@pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.__name__)
def test_equals_peft_beside_and_fused(source, tmp_path):
    """In fp64: predictions up to diffusers' rotation, which is in fp32, and the weights up to the order of sums."""
    model, path = source(tmp_path)
    expected = predict(model) if source is exported_here else predict_theirs(model)
    denoiser = ours()
    base, known = predict(denoiser), loras(denoiser)
    known.load(path, "it", 1.0)
    beside = predict(denoiser)
    bound = 1e-6 * float(expected.abs().max())
    assert (beside - expected).abs().max() <= bound and (beside - base).abs().max() > 1e4 * bound
    known.fuse([])
    assert not any(isinstance(module, AdaptedLinear) for module in denoiser.modules())
    torch.testing.assert_close(predict(denoiser), beside, rtol=1e-9, atol=1e-9)
    merged, num_changed = merged_by_peft(model), 0
    for (name, weight), before in zip(denoiser.named_parameters(), ours().parameters()):
        names = (name,) if name in merged else diffusers_names(name)
        torch.testing.assert_close(weight.data, torch.cat([merged[n] for n in names]), rtol=1e-12, atol=1e-12)
        num_changed += not torch.equal(weight, before)
    assert num_changed == len(known.loaded["it"].linears)


@torch.no_grad()
def merged_by_peft(model):
    """{name: value} of the parameters, products added by peft."""
    for module in [module for module in model.modules() if hasattr(module, "base_layer")]:
        module.merge()
    return {name.replace(".base_layer", ""): p.data for name, p in model.named_parameters() if ".lora_" not in name}


def test_output_modulation_of_flux_names_has_its_halves_swapped(tmp_path):
    """black-forest-labs/flux puts shift before scale there, diffusers and ours after it."""
    down, up = torch.randn(2, D).double(), torch.randn(2 * D, 2).double()
    save_file(
        as_kohya_file({"diffusion_model.final_layer.adaLN_modulation.1": (down, up, 2.0)}), tmp_path / "a.safetensors"
    )
    denoiser = ours()
    before = denoiser.norm_out.linear.weight.clone()
    known = loras(denoiser)
    known.load(tmp_path / "a.safetensors", "it", 1.0)
    known.fuse([])
    shift, scale = (up @ down).chunk(2)
    torch.testing.assert_close(denoiser.norm_out.linear.weight, before + torch.cat([scale, shift]))


def pair_for(linear, num_in, num_out, rank=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((rank, num_in), (num_out, rank)))
    return {f"transformer.{linear}.lora_A.weight": a.to(dtype), f"transformer.{linear}.lora_B.weight": b.to(dtype)}


def two_files(folder):
    """A LoRA on one query projection and one MLP, and one of another rank on the query, key and value together."""
    single = "single_transformer_blocks.0"
    one = pair_for(f"{single}.attn.to_q", D, D, seed=1) | pair_for(f"{single}.proj_mlp", D, 4 * D, seed=2)
    two = pair_for(f"{single}.attn.to_qkv", D, 3 * D, rank=3, seed=3)
    save_file(one, folder / "one.safetensors")
    save_file(two, folder / "two.safetensors")
    return one, two


def product(tensors, linear):
    a, b = (tensors[f"transformer.single_transformer_blocks.0.{linear}.lora_{side}.weight"].double() for side in "AB")
    return b @ a


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_several_add_up_and_leave_no_trace(tmp_path, dtype):
    """Fused weights are the exact sum rounded once; unfused and unloaded, every parameter has the base's bits."""
    one, two = two_files(tmp_path)
    denoiser = ours(dtype)
    base = {name: p.clone() for name, p in denoiser.named_parameters()}
    before, known = predict(denoiser), loras(denoiser)
    assert [known.load(tmp_path / f"{name}.safetensors", None, 3.0) for name in ("one", "two")] == ["one", "two"]
    known.set_scale("two", 2.0)
    beside = predict(denoiser)
    known.fuse([])
    fused = predict(denoiser)

    block = denoiser.single_transformer_blocks[0]
    weight = base["single_transformer_blocks.0.attn.to_qkv.weight"].double()
    expected = weight + 2.0 * product(two, "attn.to_qkv")
    expected[:D] += 3.0 * product(one, "attn.to_q")
    once_rounded = torch.finfo(dtype).eps / 2 * expected.abs() + (1e-14 if dtype == torch.float64 else 5e-7)
    assert ((block.attn.to_qkv.weight.double() - expected).abs() <= once_rounded).all()
    changed = {name for name, p in denoiser.named_parameters() if not torch.equal(p, base[name])}
    assert changed == {f"single_transformer_blocks.0.{name}.weight" for name in ("attn.to_qkv", "proj_mlp")}
    noise = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert (fused - beside).norm() <= noise * beside.norm()
    assert (beside - before).norm() > 0.1 * before.norm()

    known.unfuse(["one"])
    assert isinstance(block.proj_mlp, AdaptedLinear) and isinstance(block.attn.to_qkv, AdaptedLinear)
    assert (predict(denoiser) - beside).norm() <= noise * beside.norm()
    known.unload(["one"])
    known.unfuse([])
    assert torch.equal(block.attn.to_qkv.weight, base["single_transformer_blocks.0.attn.to_qkv.weight"])
    known.unload([])
    assert [name for name, _ in denoiser.named_parameters()] == list(base)
    assert all(torch.equal(p, base[name]) for name, p in denoiser.named_parameters())
    assert torch.equal(predict(denoiser), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    """Beside and fused are near the fp64 prediction, and the base's bits come back from host memory."""
    two_files(tmp_path)
    exact, denoiser = ours(), ours(torch.bfloat16).cuda()
    base = {name: p.clone() for name, p in denoiser.named_parameters()}
    for model in (exact, denoiser):
        known = loras(model)
        for name in ("one", "two"):
            known.load(tmp_path / f"{name}.safetensors", name, 3.0)
    expected = predict(exact)
    for change in (lambda: None, lambda: known.fuse([])):
        change()
        assert (predict(denoiser).double().cpu() - expected).norm() <= 0.05 * expected.norm()
    known.unfuse([])
    known.unload([])
    assert all(torch.equal(p, base[name]) for name, p in denoiser.named_parameters())


def test_queries_keys_and_values_land_on_their_rows(tmp_path):
    for row, name in enumerate(("to_q", "to_k", "to_v")):
        denoiser = ours()
        known, linear = loras(denoiser), denoiser.transformer_blocks[1].attn.to_qkv
        before = linear.weight.clone()
        save_file(pair_for(f"transformer_blocks.1.attn.{name}", D, D), tmp_path / f"{name}.safetensors")
        known.load(tmp_path / f"{name}.safetensors", None, 1.0)
        known.fuse([])
        different = [not torch.equal(a, b) for a, b in zip(linear.weight.chunk(3), before.chunk(3))]
        assert different == [index == row for index in range(3)]


def test_a_scale_changes_values_in_place(tmp_path):
    """A captured graph goes on with the tensors that it read."""
    two_files(tmp_path)
    denoiser = ours(torch.float32)
    known = loras(denoiser)
    known.load(tmp_path / "one.safetensors", "it", 1.0)
    known.load(tmp_path / "two.safetensors", "other", 0.0)
    adapted = denoiser.single_transformer_blocks[0].attn.to_qkv
    address, full = adapted.b.data_ptr(), predict(denoiser)
    known.set_scale("it", 0.5)
    assert denoiser.single_transformer_blocks[0].attn.to_qkv is adapted and adapted.b.data_ptr() == address
    assert not torch.allclose(predict(denoiser), full, atol=1e-4)
    known.set_scale("it", 1.0)
    assert torch.equal(predict(denoiser), full)
    known.fuse(["it"])
    known.set_scale("it", 0.0)
    torch.testing.assert_close(predict(denoiser), predict(ours(torch.float32)), rtol=1e-5, atol=1e-5)


Q = "transformer_blocks.0.attn.to_q"
BAD = {
    "unknown keys": (
        pair_for(Q, D, D) | pair_for("blocks.7.attn", D, D) | {"lora_te1_x.alpha": torch.ones(())},
        r"3 of 5 keys do not belong to a LoRA of this DiT: lora_te1_x.alpha; transformer.blocks.7.attn.lora_A.weight; ",
    ),
    "another model": (pair_for("down_blocks.0.attn", 8, 8), "none of its keys belong to a LoRA of this DiT"),
    "wider base": (
        pair_for(Q, 2 * D, 2 * D),
        rf"made for another base\? shape \[2, {2 * D}\] of .*lora_A.weight \(must be \[rank, {D}\]\)",
    ),
    "ranks": (
        {**pair_for(Q, D, D), f"transformer.{Q}.lora_B.weight": torch.zeros(D, 3)},
        rf"shape \[{D}, 3\] of .*to_q.lora_B.weight \(must be \[{D}, 2\], rank 2\)",
    ),
    "one factor": ({f"transformer.{Q}.lora_A.weight": torch.zeros(2, D)}, "to_q.lora_A.weight has no partner"),
    "nan": ({**pair_for(Q, D, D), f"transformer.{Q}.lora_A.weight": torch.full((2, D), torch.nan)}, "not finite"),
    "integers": (
        {**pair_for(Q, D, D), f"transformer.{Q}.lora_A.weight": torch.zeros(2, D, dtype=torch.int8)},
        "dtype torch.int8 of ",
    ),
    "empty": ({}, "holds no factors"),
    "biases": ({**pair_for(Q, D, D), f"transformer.{Q}.lora_B.bias": torch.zeros(D)}, "1 of 3 keys .*lora_B.bias"),
}


@pytest.mark.parametrize("tensors, message", BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_whole(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    denoiser = ours()
    known = loras(denoiser)
    with pytest.raises(ValueError, match=message) as refused:
        known.load(tmp_path / "bad.safetensors", None, 1.0)
    assert "\n" not in str(refused.value) and str(tmp_path / "bad.safetensors") in str(refused.value)
    assert known.loaded == {} and not any(isinstance(module, AdaptedLinear) for module in denoiser.modules())


def test_other_mistakes_are_told(tmp_path):
    save_file(pair_for(Q, D, D), tmp_path / "a.safetensors")
    save_file(pair_for(Q, D, D), tmp_path / "b.safetensors")
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    known = loras(ours())
    known.load(tmp_path / "a.safetensors", None, 1.0)
    with pytest.raises(ValueError, match="name='a': a LoRA of this name is loaded"):
        known.load(tmp_path / "a.safetensors", None, 1.0)
    with pytest.raises(ValueError, match=r"name='c': no LoRA of this name is loaded \(loaded: a\)"):
        known.set_scale("c", 1.0)
    with pytest.raises(ValueError, match="scale=nan: must be a finite number"):
        known.set_scale("a", float("nan"))
    with pytest.raises(ValueError, match="a.pt: must be a .safetensors file"):
        known.load(tmp_path / "a.pt", None, 1.0)
    with pytest.raises(ValueError, match="broken.safetensors: truncated or not a safetensors file"):
        known.load(tmp_path / "broken.safetensors", None, 1.0)
    with pytest.raises(FileNotFoundError, match="several files, name one of a.safetensors, b.safetensors"):
        (tmp_path / "broken.safetensors").unlink()
        known.load(tmp_path, None, 1.0)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="has none of adapter_model.safetensors, "):
        known.load(tmp_path / "none", None, 1.0)
    with pytest.raises(FileNotFoundError, match="lora=nowhere.safetensors: no such file"):
        known.load("nowhere.safetensors", None, 1.0)


def test_files_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    save_file(pair_for(Q, D, D), tmp_path / "style.safetensors")
    assert find_file("owner/name/style.safetensors") == find_file("owner/name") == tmp_path / "style.safetensors"
    assert asked[0] == ("owner/name", ["style.safetensors", "adapter_config.json"])
    assert {"adapter_config.json", "lora.safetensors"} < set(asked[1][1])
    with pytest.raises(
        FileNotFoundError, match="lora=owner/name/other.safetensors: owner/name has no other.safetensors"
    ):
        find_file("owner/name/other.safetensors")


def test_dora_is_refused(tmp_path):
    model = with_random_factors(theirs(), use_dora=True, target_modules=["to_q"])
    model.save_lora_adapter(tmp_path)
    with pytest.raises(ValueError, match="is a DoRA adapter, only plain LoRA factors are read"):
        loras(ours()).load(tmp_path, None, 1.0)


class Halved(torch.nn.Module):
    """A linear whose weight is stored as bytes; every weight is half a whole number."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight = torch.nn.Parameter((2 * linear.weight).to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 2, self.bias)


def test_quantized_weights_are_left_alone(tmp_path):
    """Factors stand beside them, also where a fused op would read the weight, and are not fused."""
    plain, quantized = ours(torch.float32), ours(torch.float32)
    for denoiser in (plain, quantized):
        block = denoiser.single_transformer_blocks[0]
        for owner, name in ((block.attn, "to_qkv"), (block, "proj_mlp"), (block, "proj_out")):
            linear = getattr(owner, name)
            linear.weight.copy_((linear.weight * 8).round() / 2)
            if denoiser is quantized:
                setattr(owner, name, Halved(linear))
    single = "single_transformer_blocks.0"
    tensors = pair_for(f"{single}.attn.to_q", D, D) | pair_for(f"{single}.proj_mlp", D, 4 * D)
    save_file(tensors | pair_for(f"{single}.proj_out", 5 * D, D), tmp_path / "a.safetensors")
    before, known = predict(quantized), loras(quantized)
    torch.testing.assert_close(before, predict(plain), rtol=1e-4, atol=1e-4)
    for manager in (known, loras(plain)):
        manager.load(tmp_path / "a.safetensors", None, 1.0)
    torch.testing.assert_close(predict(quantized), predict(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(predict(quantized), before, atol=1e-2)
    with pytest.raises(
        ValueError, match="fuse_lora: quantized weights take no products, .*0.attn.to_qkv; .*proj_mlp; "
    ):
        known.fuse([])
    assert not known.loaded["a"].fused


def test_beside_fp8_equals_peft_on_rounded_linears(tmp_path):
    """On every linear: factors see what comes in unrounded, and a norm or GELU before them writes no e4m3."""
    model = with_random_factors(theirs(torch.float32))
    model.save_lora_adapter(tmp_path)
    exact = predict_theirs(model)
    round_theirs(model, lambda name: ".lora_" in name)
    rounded = predict_theirs(model)
    denoiser = quantized_copy(ours(torch.float32), "fp8")
    without, known = predict(denoiser), loras(denoiser)
    known.load(tmp_path, "it", 1.0)
    result, cost = predict(denoiser), (rounded - exact).norm()
    assert 0.005 * exact.norm() < cost < 0.1 * exact.norm()
    assert (result - rounded).norm() < 0.25 * cost  # sums in another order are rounded elsewhere
    with pytest.raises(ValueError, match="^fuse_lora: quantized weights take no products, .*to_qkv"):
        known.fuse([])
    known.unload([])
    assert torch.equal(predict(denoiser), without)


def test_through_the_engine(tmp_path):
    """On `tiny`, from one picture to the next; names, scales and the base's picture again after `unload_lora`."""
    engine = Engine.from_pretrained("tiny", device="cpu", progress=False)
    dim, settings = engine.model.denoiser.config.dim, {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}
    save_file(pair_for(Q, dim, dim), tmp_path / "style.safetensors")

    def draw():
        return engine.generate("a cat", **settings).latents

    base = draw()
    assert engine.load_lora(tmp_path / "style.safetensors", scale=2.0) == "style"
    beside = draw()
    assert not torch.allclose(beside, base, atol=1e-3)
    engine.fuse_lora("style")
    torch.testing.assert_close(draw(), beside, rtol=1e-3, atol=1e-3)
    engine.unfuse_lora()
    assert torch.equal(draw(), beside)
    engine.set_lora_scale("style", 0)
    torch.testing.assert_close(draw(), base, rtol=1e-5, atol=1e-5)
    engine.unload_lora("style")
    assert torch.equal(draw(), base)
    assert load_file(tmp_path / "style.safetensors")  # was only read


def test_recorded_graphs_see_every_change(tmp_path, monkeypatch):
    """Each change is in the next picture, drawn with graphs; what was read of the prompt stays known."""
    engine, eager = (Engine.from_pretrained("tiny", device="cpu", progress=False) for _ in range(2))
    recorder = FakeRecorder()
    engine.denoiser.graphs = StepGraphs(recorder=recorder)
    dim = engine.model.denoiser.config.dim
    save_file(pair_for(Q, dim, dim), tmp_path / "style.safetensors")
    changes = [
        lambda e: None,
        lambda e: e.load_lora(tmp_path / "style.safetensors", scale=2.0),
        lambda e: e.set_lora_scale("style", -1.0),
        lambda e: e.fuse_lora(),
        lambda e: e.unfuse_lora(),
        lambda e: e.unload_lora(),
    ]
    for number, change in enumerate(changes, start=1):
        results = []
        for each in (engine, eager):
            change(each)
            results.append(each.generate("a cat", num_inference_steps=4, height=48, width=48, seed=1))
        assert results[0].graphs == "graph, recorded for this shape" and recorder.num_recorded == number
        assert torch.equal(results[0].latents, results[1].latents)
        assert len(engine.denoiser.graphs) == 1
        monkeypatch.setattr(engine.model.vlm, "encode", None)  # the conditioning is known from now on
