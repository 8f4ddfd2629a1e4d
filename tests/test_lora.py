"""LoRA on the DiT: which factors learn, what they compute, and that merging and exporting are the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train_fakes import FLUX, small_batch, small_config, small_model

from uniworld.checkpoint.load import load_denoiser
from uniworld.checkpoint.names import split_diffusers
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.train import lora
from uniworld.train.stages import freeze_except, patterns_of
from uniworld.train.step import training_loss

HERE = Path(__file__).parent
RANK = 3


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora_config(stage="stage2"):
    return small_config(stage, model={"lora_rank": RANK})


def lora_model(config):
    model = small_model(config)
    lora.add_lora(model.denoiser, RANK)
    freeze_except(model, patterns_of(config))
    return model


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def loss_of(model, config, dtype=torch.float32):
    batch = small_batch(config, 0, dtype)
    return training_loss(model, batch, config.flow, torch.Generator().manual_seed(0))


def dit_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    img, txt = random(2, 6, FLUX.in_channels), random(2, 5, FLUX.joint_attention_dim)
    return img, txt, random(2, FLUX.pooled_projection_dim), torch.tensor([0.3, 0.8]), torch.ones(2), ids


@pytest.mark.parametrize("stage, connectors", [("stage1", ["denoise"]), ("stage2", ["denoise", "siglip"])])
def test_factors_and_the_stages_connectors_learn(peft, stage, connectors):
    """Every factor moves the loss: a linear whose weight is read by a fused op would leave its factors without."""
    config = lora_config(stage)
    model = lora_model(config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name in trained if not lora.is_factor(name)}
    expected = {f"{part}_projector.{i}.{kind}" for part in connectors for i in (0, 2) for kind in ("weight", "bias")}
    assert others == expected
    linears = list(lora.adapted_linears(dict.fromkeys(trained)))
    assert len(linears) == 4 * FLUX.num_layers + FLUX.num_single_layers == 10
    assert len(trained) == len(others) + 2 * len(linears)

    randomize(model)
    loss_of(model, config).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name


def test_starts_as_the_base_bit_by_bit(peft):
    config = lora_config()
    assert torch.equal(loss_of(lora_model(config), config), loss_of(small_model(config), config))


def test_computes_the_weights_with_the_product_added(peft):
    """In fp64, where only the order of sums differs."""
    adapted = lora_model(lora_config()).double()
    randomize(adapted)
    plain = small_model(small_config()).double()
    factors = dict(adapted.denoiser.named_parameters())
    with torch.no_grad():
        for linear, a, b in lora.adapted_linears(factors):
            plain.denoiser.get_parameter(f"{linear}.weight").add_(factors[b] @ factors[a])
        inputs = dit_inputs(torch.float64)
        expected, found = plain.denoiser(*inputs), adapted.denoiser(*inputs)
        base = small_model(small_config()).double().denoiser(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert (found - base).abs().max() > 0.01


def test_merging_is_exact_and_restores_the_names(peft):
    model, plain = lora_model(lora_config()), small_model(small_config())
    randomize(model)
    factors = {name: p.clone() for name, p in model.denoiser.named_parameters()}
    inputs = dit_inputs()
    with torch.no_grad():
        before = model.denoiser(*inputs)
        lora.merge_lora(model.denoiser)
        after = model.denoiser(*inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    base, merged = dict(plain.denoiser.named_parameters()), dict(model.denoiser.named_parameters())
    assert list(merged) == list(base)
    adapted = {f"{linear}.weight": (a, b) for linear, a, b in lora.adapted_linears(factors)}
    for name, value in merged.items():
        expected = base[name].double()
        if name in adapted:
            a, b = (factors[factor].double() for factor in adapted[name])
            expected = expected + b @ a
            assert not torch.equal(value, base[name])
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6)


def test_diffusers_computes_the_same_from_the_exported_adapter(peft, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sys.path.insert(0, str(HERE.parent / "bench"))
    try:
        from peers import diffusers_flux, run_diffusers
    finally:
        sys.path.pop(0)
    model = lora_model(lora_config())
    randomize(model)
    factors = dict(model.named_parameters())
    theirs = diffusers_flux(small_model(small_config()).denoiser, "cpu")
    assert isinstance(theirs, diffusers.FluxTransformer2DModel)
    inputs = dit_inputs()
    names = ("img", "txt", "pooled", "timestep", "guidance", "img_ids")
    with torch.no_grad():
        expected = model.denoiser(*inputs)
        base = run_diffusers(theirs, **dict(zip(names, inputs)))
        theirs.load_lora_adapter({k: v.detach() for k, v in lora.diffusers_adapter(factors, factors).items()})
        found = run_diffusers(theirs, **dict(zip(names, inputs)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.01


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model.lora_rank=8: peft is missing; pip install 'uniworld\[train\]'"):
        lora.add_lora(FluxTransformer(FLUX), 8)
    with pytest.raises(ValueError, match="model.lora_rank=0: must be at least 1"):
        lora.add_lora(FluxTransformer(FLUX), 0)


def test_count_at_full_scale(peft):
    """rank x (in + out) of each target: 19 double blocks with two fused projections and two outputs, 38 single ones."""
    with torch.device("meta"):
        denoiser = FluxTransformer(FluxConfig())
    lora.add_lora(denoiser, 16)
    found = sum(p.numel() for name, p in denoiser.named_parameters() if lora.is_factor(name))
    D = 3072
    assert found == 16 * (19 * (2 * (D + 3 * D) + 2 * (D + D)) + 38 * (D + 3 * D))


def test_preset_trains_the_factors_alone(peft):
    config = small_config("lora", model={"lora_rank": RANK})
    model = small_model(small_config())
    lora.add_lora(model.denoiser, RANK)
    trained = freeze_except(model, patterns_of(config))
    assert trained and all(lora.is_factor(name) for name in trained)
    with_connectors = {name for name, p in lora_model(lora_config()).named_parameters() if p.requires_grad}
    assert {name for name in with_connectors if lora.is_factor(name)} == set(trained)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, zero_stage", [(1, 2), (2, 3)])
def test_a_run_is_exported_merged(peft, tmp_path, ranks, zero_stage):
    pytest.importorskip("deepspeed")
    run, out = tmp_path / "run", tmp_path / "out"
    config = tmp_path / "run.yaml"
    tree = {
        "run_dir": str(run),
        "num_steps": 3,
        "model": {"path": "tiny", "lora_rank": RANK},
        "data": {"anchor_px": 64 * 64},
        "stage": {"preset": "stage2"},
        "optim": {"lr": 1e-2},
        "sharding": {"dtype": "fp32", "zero_stage": zero_stage},
        "validation": {"every_steps": 2, "prompts": ["a cat"], "num_inference_steps": 1},
        "checkpoint": {"every_steps": 3},
    }
    config.write_text(yaml.safe_dump(tree))
    command = [str(HERE / "train_fakes.py"), "train", str(config)]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "denoiser.*.lora_A.*" in done.stderr
    from uniworld.train.export import export

    export(run, out, progress=False)
    base, merged = load_denoiser(dtype="float32", progress=False), load_denoiser(out, dtype="float32", progress=False)
    adapter = load_file(out / "lora.safetensors")
    deltas = {}
    for key in adapter:
        if key.endswith(".lora_A.weight"):
            linear = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            product = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
            place = split_diffusers(f"{linear}.weight")
            deltas.setdefault(place.name, {})[place.row] = product
    assert len(deltas) == 2 * 4 + 4
    merged_parameters = dict(merged.denoiser.named_parameters())
    for name, p in base.denoiser.named_parameters():
        if name in deltas:
            p = (p + torch.cat([deltas[name][row] for row in sorted(deltas[name])])).bfloat16().float()
            assert not torch.equal(merged_parameters[name], dict(base.denoiser.named_parameters())[name])
        torch.testing.assert_close(merged_parameters[name], p, rtol=2**-7, atol=0)
