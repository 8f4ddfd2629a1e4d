"""The VAE decodes with channels last in memory where it runs on a CUDA device, and only there."""

import pytest
import torch

from uniworld.checkpoint.load import load_uniworld
from uniworld.engine import Engine
from uniworld.engine.decoder import Decoder
from uniworld.engine.offload import place

FAST = {"num_inference_steps": 1, "height": 64, "width": 48, "seed": 3}


@pytest.fixture
def model():
    return load_uniworld("tiny", device="cpu", progress=False)


def kernels(vae):
    """Weights of convolutions that are more than a product at every place: of others both layouts are one."""
    found = [p for p in vae.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert len(found) > 20
    return found


def lies_channels_last(weight):
    return weight.stride(1) == 1 and weight.is_contiguous(memory_format=torch.channels_last)


def latents_for(vae, dtype):
    return torch.randn(2, 16, 6, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2


def test_decoders_on_a_cuda_device_set_it(model):
    before = [p.clone() for p in kernels(model.vae)]
    assert not any(map(lies_channels_last, before))
    Decoder(model.vae, torch.device("cpu"))
    assert not any(map(lies_channels_last, kernels(model.vae)))
    Decoder(model.vae, torch.device("cuda", 0))
    assert all(map(lies_channels_last, kernels(model.vae)))
    assert all(map(torch.equal, kernels(model.vae), before))


def test_values_stay_and_activations_lie_so_too(model):
    vae, seen = model.vae.double(), []
    latents = latents_for(vae, torch.float64)
    expected = vae.decode(latents)
    Decoder(vae, torch.device("cuda", 0))
    conv = vae.model.decoder.up_blocks[0].resnets[0].conv1
    conv.register_forward_hook(lambda module, args, y: seen.append(lies_channels_last(y)))
    assert (vae.decode(latents) - expected).norm() < 1e-6 * expected.norm()  # the latents pass through fp32
    assert seen == [True]


def test_it_is_set_before_weights_are_taken_away(monkeypatch, model):
    """What comes to the device with offload="parts" lies so when it comes."""
    order = []
    monkeypatch.setattr(Decoder, "__init__", lambda self, vae, device: order.append(("decoder", device)))
    monkeypatch.setattr("uniworld.engine.engine.place", lambda *args: (order.append("place"), place(*args))[1])
    Engine(model, offload="parts")
    assert order == [("decoder", model.device), "place"]


def test_moved_weights_keep_it(model):
    Decoder(model.vae, torch.device("cuda", 0))
    parts = place(model, "parts")
    parts.device = torch.device("meta")
    parts.bring("decode")
    assert all(weight.is_meta and lies_channels_last(weight) for weight in kernels(model.vae))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [None, "parts"])
def test_values_on_a_gpu(model, offload):
    """Against fp64: no further off than plain bf16 with channels first, but for chance."""
    truth = model.vae.double().decode(latents_for(model.vae, torch.float64))
    there = load_uniworld("tiny", device="cuda", dtype="bfloat16", progress=False)
    latents = latents_for(there.vae, torch.float32).cuda()
    errors = [(there.vae.decode(latents).double().cpu() - truth).norm() / truth.norm()]
    engine = Engine(there, offload=offload)
    if offload:
        engine._parts.bring("decode")
    assert all(weight.is_cuda and lies_channels_last(weight) for weight in kernels(there.vae))
    errors.append((there.vae.decode(latents).double().cpu() - truth).norm() / truth.norm())
    assert errors[1] < 1.5 * errors[0] + 1e-3
    assert len(engine.generate("a cat", **FAST).images) == 1
