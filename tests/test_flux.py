"""Our DiT against diffusers' FluxTransformer2DModel with the same weights."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from uniworld.models.flux import FluxConfig, FluxTransformer

CONFIGS = {
    "guided": {
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
    "one_each": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 24,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    },
    "head_128": {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 128,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
}


def fuse_qkv(state: dict) -> dict:
    """diffusers' separate q, k and v as rows of one matrix; written apart from the loader, which it checks."""
    fused = {}
    for key, value in state.items():
        if ".to_q." in key:
            fused[key.replace("to_q", "to_qkv")] = torch.cat([state[key.replace("to_q", f"to_{p}")] for p in "qkv"])
        elif ".add_q_proj." in key:
            parts = [state[key.replace("add_q_proj", f"add_{p}_proj")] for p in "qkv"]
            fused[key.replace("add_q_proj", "add_qkv_proj")] = torch.cat(parts)
        elif not any(f".{name}." in key for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")):
            fused[key] = value
    return fused


def make_pair(name: str, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, FluxTransformer]:
    torch.manual_seed(0)
    config = {"in_channels": 16, **CONFIGS[name]}
    theirs = FluxTransformer2DModel(**config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
    ours = FluxTransformer(FluxConfig.from_dict(config))
    ours.load_state_dict(fuse_qkv(theirs.state_dict()), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def make_inputs(config: FluxConfig, dtype: torch.dtype, batch: int = 2, num_txt: int = 11) -> dict:
    g = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(5.0))
    return {
        "img": randn(batch, 20, config.in_channels),
        "txt": randn(batch, num_txt, config.joint_attention_dim),
        "pooled": randn(batch, config.pooled_projection_dim),
        "timestep": torch.tensor([0.3, 0.9][:batch], dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype) if config.guidance_embeds else None,
        "img_ids": ids,
    }


def run_theirs(model: FluxTransformer2DModel, inputs: dict) -> torch.Tensor:
    return model(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["timestep"],
        guidance=inputs["guidance"],
        img_ids=inputs["img_ids"],
        txt_ids=torch.zeros(inputs["txt"].shape[1], 3),
    ).sample


def assert_within(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    """Our error against fp64 is at most twice diffusers' own, with one rounding of the largest value as a floor."""
    floor = torch.finfo(ours.dtype).eps * truth.abs().max()
    bound = 2 * (theirs - truth).abs().max() + floor
    error = (ours - truth).abs().max()
    assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prediction_and_gradients_match_diffusers(name, dtype):
    theirs64, _ = make_pair(name, torch.float64)
    theirs, ours = make_pair(name, dtype)
    # diffusers' fp64 model starts from the same rounded weights
    theirs64.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    inputs = make_inputs(ours.config, dtype)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    target = torch.randn(inputs["img"].shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    outputs, grads = [], []
    for run, model, given in (
        (run_theirs, theirs64, exact),
        (run_theirs, theirs, inputs),
        (lambda m, i: m(**i), ours, inputs),
    ):
        out = run(model, given)
        (out * target.to(out.dtype)).sum().backward()
        outputs.append(out.detach())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    truth, plain, mine = outputs
    assert_within(mine, plain, truth, "prediction")
    truth_grads, plain_grads = fuse_qkv(grads[0]), fuse_qkv(grads[1])
    assert set(grads[2]) == set(truth_grads)
    for key, grad in grads[2].items():
        assert_within(grad, plain_grads[key], truth_grads[key], f"gradient of {key}")


def test_fp64_model_equals_diffusers():
    theirs, ours = make_pair("guided", torch.float64)
    inputs = make_inputs(ours.config, torch.float64)
    error = (ours(**inputs) - run_theirs(theirs, inputs)).abs().max()
    assert error < 2e-4  # diffusers embeds 1000 * timestep in fp32 whatever its dtype: angles are off by up to 6e-5


def test_padded_batch_equals_each_sample_alone():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    lengths = (11, 6)
    with torch.no_grad():
        batched = ours(**inputs, txt_lengths=lengths)
        for i, length in enumerate(lengths):
            alone = {k: v[i : i + 1] if k != "img_ids" else v for k, v in inputs.items()}
            alone["txt"] = alone["txt"][:, :length]
            torch.testing.assert_close(batched[i : i + 1], ours(**alone), atol=1e-5, rtol=1e-5)


def test_padding_content_is_never_seen():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    with torch.no_grad():
        before = ours(**inputs, txt_lengths=(11, 6))
        inputs["txt"][1, 6:] = 1e3
        after = ours(**inputs, txt_lengths=(11, 6))
    assert torch.equal(before, after)


def test_modulation_table_holds_every_step():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    steps = torch.tensor([1.0, 0.6, 0.2])
    with torch.no_grad():
        table = ours.modulation(steps[:, None], inputs["guidance"], inputs["pooled"])
        assert table.shape == (3, 2, ours.config.num_modulations * ours.config.dim)
        for i, sigma in enumerate(steps):
            row = ours.modulation(sigma.expand(2), inputs["guidance"], inputs["pooled"])
            torch.testing.assert_close(table[i], row, atol=1e-6, rtol=1e-5)


def test_text_order_does_not_matter():
    _, ours = make_pair("guided", torch.float32)
    inputs = make_inputs(ours.config, torch.float32)
    with torch.no_grad():
        before = ours(**inputs)
        inputs["txt"] = inputs["txt"].flip(1)
        torch.testing.assert_close(ours(**inputs), before, atol=1e-5, rtol=1e-5)


def test_full_scale_parameter_count():
    with torch.device("meta"):
        model = FluxTransformer(FluxConfig())
    total = sum(p.numel() for p in model.parameters())
    assert total == 11_901_408_320  # FLUX.1-dev
    modulation = sum(p.numel() for n, p in model.named_parameters() if ".norm1" in n or ".norm.linear" in n)
    assert 3.2e9 < modulation < 3.3e9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes_dims_rope": [4, 6, 8]}, "axes_dims_rope"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"patch_size": 2}, "patch_size=2"),
    ],
)
def test_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FluxConfig.from_dict({**CONFIGS["guided"], **change})


def test_guidance_must_fit_the_checkpoint():
    _, ours = make_pair("guided", torch.float32)
    inputs = {**make_inputs(ours.config, torch.float32), "guidance": None}
    with pytest.raises(ValueError, match="guidance is required"):
        ours(**inputs)
