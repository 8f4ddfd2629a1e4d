"""flow_noise and region_mse against the authors' training loss (three batches, with its intermediates).

The authors treat padding as we do: latents are padded with zeros to the largest size of the batch, the noise is drawn
for the padded size, and the loss is the sum over valid latents divided by their number times the channels; the weights
do not enter the divisor. They also write 0 as the weight of padded latents; here `valid` alone decides, so the tests
put another weight there. Text-to-image batches have the single weight 1.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uniworld.kernels.flow_noise import flow_noise, pack
from uniworld.kernels.region_mse import region_mse
from uniworld.kernels.registry import INTERPRET, use_backend

GPU = torch.cuda.is_available()
GOLDEN = load_file(Path(__file__).parent / "data" / "golden_loss.safetensors")
CASES = ("edit_B1_64px", "t2i_B1_96x64_nomask", "mixed_B2_unequal_sizes")
BACKENDS = ["torch", *(["triton"] if GPU or INTERPRET else [])]


def load(case):
    device = "cuda" if GPU else "cpu"
    return {k.removeprefix(case + "."): v.to(device) for k, v in GOLDEN.items() if k.startswith(case + ".")}


def loss_arguments(golden):
    """Prediction, target, weights and validity in the packed layout; a weight that must not count in the padding."""
    pred, weighting = golden["model_pred_unpacked"], golden["weighting"]
    weight = pack(weighting.expand(pred.shape[0], 1, *pred.shape[2:]))
    valid = golden.get("pad_weight_mask")
    if valid is not None:
        valid = pack(valid) != 0
        weight = weight.masked_fill(~valid, 7.0)
    return pack(pred), pack(golden["target"]), weight, valid


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_noisy_latents_and_target(case, backend):
    golden = load(case)
    with use_backend(backend):
        noisy, target = flow_noise(golden["latents"], golden["noise"], golden["sigmas"])
    torch.testing.assert_close(noisy, golden["packed_noisy_model_input"], rtol=1e-6, atol=1e-6)
    assert torch.equal(target, pack(golden["target"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case, backend):
    golden = load(case)
    pred, target, weight, valid = loss_arguments(golden)
    with use_backend(backend):
        pred.requires_grad_()
        loss = region_mse(pred, target, weight, valid)
        loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-6)

    # The authors' expression in their own layout, in fp64: the gradient agrees too.
    unpacked = golden["model_pred_unpacked"].double().requires_grad_()
    weighted = golden["weighting"].double() * (unpacked - golden["target"].double()) ** 2
    mask = golden.get("pad_weight_mask")
    count = unpacked.numel() if mask is None else mask.sum() * unpacked.shape[1]
    (weighted.sum() / count).backward()
    torch.testing.assert_close(pred.grad.double(), pack(unpacked.grad), rtol=1e-5, atol=1e-9)


def test_unweighted_is_one_weighted():
    pred, target, weight, _ = loss_arguments(load("t2i_B1_96x64_nomask"))
    assert (weight == 1).all()
    assert region_mse(pred, target).item() == pytest.approx(region_mse(pred, target, weight).item(), rel=1e-6)


def test_padding_counts_neither_in_the_sum_nor_in_the_mean():
    """The same batch without its mask gives another loss, so the mask is what the golden value checks."""
    golden = load("mixed_B2_unequal_sizes")
    pred, target, weight, valid = loss_arguments(golden)
    assert 0 < (~valid).sum() < valid.numel()
    assert abs(region_mse(pred, target, weight).item() - golden["loss"].item()) > 0.1
