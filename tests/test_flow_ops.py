"""flow_step, flow_noise and region_mse: independent definitions, properties, bad input. fp64 errors: test_kernels."""

import pytest
import torch
from torch import Tensor

from uniworld.kernels.flow_noise import flow_noise, pack
from uniworld.kernels.flow_step import flow_step
from uniworld.kernels.region_mse import _forward_op, region_mse
from uniworld.kernels.registry import INTERPRET, use_backend

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ["torch", *(["triton"] if GPU or INTERPRET else [])]
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


# flow_step


@both
def test_step_equals_the_diffusers_scheduler(backend):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    latents = ours = randn(2, 12, 64)
    dsigma = scheduler.sigmas.diff().to(DEVICE)
    with use_backend(backend):
        for i, t in enumerate(scheduler.timesteps):
            velocity = randn(2, 12, 64)
            latents = scheduler.step(velocity, t, latents).prev_sample
            ours = flow_step(ours, velocity, dsigma[i : i + 1])
    torch.testing.assert_close(ours, latents, rtol=1e-6, atol=1e-6)


@both
def test_step_guidance(backend):
    latents, cond, uncond = randn(2, 5, 8), randn(2, 5, 8), randn(2, 5, 8)
    dsigma = torch.tensor([-0.25, -0.5], device=DEVICE)
    with use_backend(backend):
        at_one = flow_step(latents, cond, dsigma, uncond, 1.0)
        at_zero = flow_step(latents, cond, dsigma, uncond, 0.0)
        at_three = flow_step(latents, cond, dsigma, uncond, 3.0)
        plain = flow_step(latents, cond, dsigma)
    torch.testing.assert_close(at_one, plain)
    torch.testing.assert_close(at_zero[1], latents[1] - 0.5 * uncond[1])
    torch.testing.assert_close(at_three[0], latents[0] - 0.25 * (3 * cond[0] - 2 * uncond[0]))


@both
def test_step_accumulates_in_fp32(backend):
    """bf16 in, one rounding out: the error is at most half a unit (one where the interpreter truncates)."""
    latents, cond, uncond = (randn(1, 64, 64, dtype=torch.bfloat16) for _ in range(3))
    dsigma = torch.tensor([-0.037], device=DEVICE)
    exact = latents.double() + dsigma.double() * (uncond.double() + 4.5 * (cond.double() - uncond.double()))
    with use_backend(backend):
        ours = flow_step(latents, cond, dsigma, uncond, 4.5)
    units = 1.0 if backend == "triton" and not GPU else 0.5
    unit = torch.finfo(torch.bfloat16).eps * 2.0 ** exact.abs().log2().floor()
    assert ours.dtype == torch.bfloat16 and ((ours.double() - exact).abs() <= units * unit * 1.001 + 1e-6).all()


@both
def test_step_strided_and_mixed_dtypes(backend):
    """A velocity cut out of the joint sequence; fp32 latents with a bf16 velocity."""
    joint = randn(2, 9, 16, dtype=torch.bfloat16)
    latents, dsigma = randn(2, 6, 16), torch.tensor([-0.5], device=DEVICE)
    with use_backend(backend):
        ours = flow_step(latents, joint[:, :6], dsigma)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, latents - 0.5 * joint[:, :6].float())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"velocity": torch.zeros(1, 4, 7)}, r"velocity=\(1, 4, 7\): must be \(1, 4, 8\)"),
        ({"dsigma": torch.zeros(3)}, r"dsigma=\(3,\): must be \(1,\) or \(1,\)"),
        ({"dsigma": torch.zeros(1, dtype=torch.bfloat16)}, r"dsigma\.dtype=torch\.bfloat16: must be torch\.float32"),
        ({"uncond_velocity": torch.zeros(1, 3, 8)}, r"uncond_velocity=\(1, 3, 8\): must be \(1, 4, 8\)"),
        ({"latents": torch.zeros(4, 8)}, r"latents=\(4, 8\): must be \[batch, tokens, channels\]"),
    ],
)
def test_step_refuses(change, message):
    good = {"latents": torch.zeros(1, 4, 8), "velocity": torch.zeros(1, 4, 8), "dsigma": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        flow_step(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_step_in_a_cuda_graph():
    """dsigma is read on the device at replay, so that one graph serves every step."""
    latents, velocity, dsigma = randn(1, 64, 64), randn(1, 64, 64), torch.zeros(1, device=DEVICE)
    flow_step(latents, velocity, dsigma)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flow_step(latents, velocity, dsigma)
    for value in (-0.5, -0.125):
        dsigma.fill_(value)
        graph.replay()
        torch.testing.assert_close(out, latents + value * velocity)


# flow_noise


@both
def test_noise_ends_and_order(backend):
    """sigma 0 gives the latents, sigma 1 the noise; channel c * 4 + dy * 2 + dx of a token is pixel (2y+dy, 2x+dx)."""
    latents, noise = randn(2, 3, 4, 6), randn(2, 3, 4, 6)
    with use_backend(backend):
        noisy, target = flow_noise(latents, noise, torch.tensor([0.0, 1.0], device=DEVICE))
    assert noisy.shape == target.shape == (2, 6, 12)
    for token in range(6):
        for channel in range(12):
            c, dy, dx = channel // 4, channel // 2 % 2, channel % 2
            y, x = token // 3 * 2 + dy, token % 3 * 2 + dx
            assert noisy[0, token, channel] == latents[0, c, y, x]
            assert noisy[1, token, channel] == noise[1, c, y, x]
            assert target[1, token, channel] == noise[1, c, y, x] - latents[1, c, y, x]


@both
def test_noise_dtype_and_strides(backend):
    latents = randn(2, 16, 6, 4).contiguous(memory_format=torch.channels_last)
    noise, sigma = randn(2, 16, 6, 8)[..., ::2], torch.tensor([0.3, 0.7], device=DEVICE)
    with use_backend(backend):
        noisy, target = flow_noise(latents, noise, sigma, dtype=torch.bfloat16)
    assert noisy.dtype == torch.bfloat16 and target.dtype == torch.float32
    s = sigma.view(2, 1, 1)
    exact = (1 - s) * pack(latents) + s * pack(noise)
    torch.testing.assert_close(noisy.float(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    assert torch.equal(target, pack(noise) - pack(latents))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": torch.zeros(1, 4, 3, 4)}, r"latents=\(1, 4, 3, 4\): must be .* even h and w"),
        ({"noise": torch.zeros(1, 4, 4, 6)}, r"noise=\(\(1, 4, 4, 6\), torch.float32\): must be"),
        ({"noise": torch.zeros(1, 4, 4, 4).bfloat16()}, r"noise=\(\(1, 4, 4, 4\), torch.bfloat16\): must be"),
        ({"sigma": torch.zeros(2)}, r"sigma=\(2,\): must be \(1,\)"),
        ({"dtype": torch.float16}, r"dtype=torch\.float16: must be"),
    ],
)
def test_noise_refuses(change, message):
    good = {"latents": torch.zeros(1, 4, 4, 4), "noise": torch.zeros(1, 4, 4, 4), "sigma": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        flow_noise(**{**good, **change})


# region_mse


def loss_inputs(B=2, L=700, C=64) -> dict[str, Tensor]:
    valid = torch.ones(B, L, 4, dtype=torch.bool, device=DEVICE)
    valid[0, L // 2 :] = False
    valid[1, :, 3] = False
    weight = torch.where(randn(B, L, 4) > 1, 5.5, 1.0)
    return {"pred": randn(B, L, C), "target": randn(B, L, C), "weight": weight, "valid": valid}


def loss_by_loop(pred, target, weight, valid):
    """One latent at a time, in fp64."""
    total, count = 0.0, 0
    for b, token, latent in valid.nonzero().tolist():
        error = pred[b, token, latent::4].double() - target[b, token, latent::4].double()
        total += weight[b, token, latent].item() * error.square().sum().item()
        count += error.numel()
    return total / count


@both
def test_loss_by_definition(backend):
    inputs = loss_inputs()
    with use_backend(backend):
        loss = region_mse(**inputs)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(loss_by_loop(**inputs), rel=1e-6)


@both
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_loss_ignores_padding_even_nan(backend, dtype):
    inputs = loss_inputs()
    inputs["valid"] = inputs["valid"].to(dtype)
    padding = (inputs["valid"] == 0).repeat(1, 1, 16)
    results = []
    for fill in (0.0, float("nan")):
        pred = inputs["pred"].masked_fill(padding, fill).requires_grad_()
        target = inputs["target"].masked_fill(padding, -fill)
        with use_backend(backend):
            loss = region_mse(pred, target, inputs["weight"], inputs["valid"])
            loss.backward()
        results.append((loss.detach(), pred.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert (results[1][1][padding] == 0).all() and (results[1][1][~padding] != 0).any()


@both
def test_loss_gradient_scales_with_the_incoming_one(backend):
    """Backward twice through one graph, by 1 and by 0.25 as accumulation over four steps does; exact powers of two."""
    inputs = loss_inputs()
    pred = inputs["pred"].requires_grad_()
    with use_backend(backend):
        loss = region_mse(**inputs)
        (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
        (quarter,) = torch.autograd.grad(0.25 * loss, pred)
    weight, valid = (inputs[k].double().repeat(1, 1, 16) for k in ("weight", "valid"))
    exact = 2 * weight * (pred.detach().double() - inputs["target"].double()) * valid / valid.sum()
    torch.testing.assert_close(once.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(quarter, 0.25 * once)


@both
def test_loss_is_deterministic_and_without_gradient_where_none_is_asked(backend):
    inputs = loss_inputs()
    with use_backend(backend):
        first, second = region_mse(**inputs), region_mse(**inputs)
        with torch.no_grad():
            third = region_mse(**{**inputs, "pred": inputs["pred"].requires_grad_()})
    assert torch.equal(first, second) and torch.equal(first, third) and not third.requires_grad


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter or a GPU")
def test_loss_writes_no_gradient_for_evaluation():
    inputs = loss_inputs(B=2, L=8, C=8)
    with use_backend("triton"):
        loss, grad, _ = _forward_op(*inputs.values(), False)
        kept, full, _ = _forward_op(*inputs.values(), True)
    assert grad.numel() == 0 and full.shape == inputs["pred"].shape and torch.equal(loss, kept)


@both
def test_loss_of_nothing_is_zero(backend):
    pred = randn(1, 4, 8).requires_grad_()
    with use_backend(backend):
        loss = region_mse(pred, randn(1, 4, 8), valid=torch.zeros(1, 4, 4, dtype=torch.bool, device=DEVICE))
        loss.backward()
        empty = region_mse(randn(1, 0, 8), randn(1, 0, 8))
    assert loss.item() == 0 and (pred.grad == 0).all() and empty.item() == 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"pred": torch.zeros(1, 4, 6)}, r"pred=\(1, 4, 6\): must be .* channels a multiple of 4"),
        ({"target": torch.zeros(1, 5, 8)}, r"target=\(1, 5, 8\): must be \(1, 4, 8\)"),
        ({"weight": torch.zeros(1, 4, 8)}, r"weight=\(1, 4, 8\): must be \(1, 4, 4\)"),
        ({"weight": torch.zeros(1, 4, 4).bfloat16()}, r"weight\.dtype=torch\.bfloat16: must be torch\.float32"),
        ({"valid": torch.zeros(1, 4, 4)}, r"valid\.dtype=torch\.float32: must be torch\.bool or torch\.uint8"),
        ({"target": torch.zeros(1, 4, 8, requires_grad=True)}, r"target\.requires_grad=True: only pred"),
    ],
)
def test_loss_refuses(change, message):
    good = {"pred": torch.zeros(1, 4, 8), "target": torch.zeros(1, 4, 8)}
    with pytest.raises(ValueError, match=message):
        region_mse(**{**good, **change})
