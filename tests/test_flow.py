"""Sigma tables, packing and position ids: golden, and diffusers as a second opinion."""

import pytest
import torch
from diffusers import FluxPipeline
from golden import case, cases, resolve

from uniworld.models import flow

SAMPLING = [c["name"] for c in cases("d_sampling")]


@pytest.mark.parametrize("name", SAMPLING)
def test_sigmas_match_golden(name):
    inputs, outputs = resolve(case("d_sampling", name))
    num_tokens = (inputs["height"] // 16) * (inputs["width"] // 16)
    assert flow.shift_mu(num_tokens) == pytest.approx(outputs["mu"], abs=1e-12)
    mine = flow.sigmas(inputs["num_inference_steps"], num_tokens)
    torch.testing.assert_close(mine, outputs["sigmas"], atol=2e-7, rtol=0)  # two roundings of fp32
    torch.testing.assert_close(1000 * mine[:-1], outputs["timesteps"], atol=2e-4, rtol=0)
    assert mine[-1] == 0


def test_training_shift_matches_golden():
    inputs, outputs = resolve(case("e_train_loss", "sigma_shift_latent_64x64"))
    mu = flow.shift_mu(inputs["latent_h"] * inputs["latent_w"] // 4)
    mine = flow.time_shift(inputs["z"].sigmoid(), mu)
    torch.testing.assert_close(mine, outputs["sigmas"], atol=1e-6, rtol=0)


def test_packing_matches_diffusers_and_unpacks():
    latents = torch.randn(2, 16, 8, 12)
    packed = flow.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(flow.unpack(packed, 64, 96), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(flow.image_ids(64, 96), ids)


def test_initial_noise_matches_golden():
    inputs, _ = resolve(case("d_sampling", "edit1_64x96_4step"))
    noise = flow.initial_noise(inputs["torch_generator_cpu_seed"], inputs["height"], inputs["width"])
    assert torch.equal(noise, inputs["initial_latents_packed"])
    assert not torch.equal(noise, flow.initial_noise(43, inputs["height"], inputs["width"]))


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        flow.sigmas(0, 256)
