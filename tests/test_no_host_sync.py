"""The step loop never makes the host wait for the device: it would wait on every step, and the device for the host.

On a CPU every operation that would wait on a GPU is forbidden while the loop runs; on a GPU torch itself watches.
"""

from contextlib import contextmanager

import pytest
import torch
from denoise_jobs import FakeRecorder, draw, make_denoiser, make_dit, make_job
from torch.utils._python_dispatch import TorchDispatchMode

from uniworld.engine.denoiser import Denoiser
from uniworld.engine.lora import AdaptedLinear
from uniworld.engine.quantize import FP8_CAPABILITY, quantizable, quantized_copy
from uniworld.models.flux import FluxTransformer

GPU = torch.cuda.is_available()
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
# Results whose shape or value the host must know, and tensors made from Python numbers.
OPS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "lift_fresh",
    "_unique2",
    "repeat_interleave.Tensor",
}


class HostWaits(AssertionError):
    """Something would have made the host wait."""


class ForbidOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        by_mask = name == "index.Tensor" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if by_mask or name in OPS or name.split(".")[0] in OPS:
            raise HostWaits(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def forbid_host_sync():
    with pytest.MonkeyPatch.context() as patch:
        for name in METHODS:

            def wait(*args, name=name, **kwargs):
                raise HostWaits(name)

            patch.setattr(torch.Tensor, name, wait)
        with ForbidOps():
            yield


@pytest.fixture
def watched(monkeypatch):
    """The loop of every denoiser is watched; gives how often it ran."""
    loop, runs = Denoiser._loop, []

    def watch(self, *args):
        runs.append(1)
        with forbid_host_sync():
            return loop(self, *args)

    monkeypatch.setattr(Denoiser, "_loop", watch)
    return runs


PADDED = [{"seed": 1, "num_txt": 5}, {"seed": 2, "num_txt": 9}]
CASES = {  # (jobs, settings of all)
    "plain": ([{"seed": 1}], {}),
    "true cfg": ([{"seed": 1}], {"true_cfg_scale": 3.0}),
    "batch": ([{"seed": 1}, {"seed": 2}], {}),
    "padded": (PADDED, {}),
    "padded, true cfg": (PADDED, {"true_cfg_scale": 3.0}),
    "taylor": (PADDED, {"cache": "taylor", "cache_order": 2}),
    "first block, threshold 0": (PADDED, {"cache": "first_block", "cache_threshold": 0.0}),
}


def in_fp8(model: FluxTransformer) -> FluxTransformer:
    return quantized_copy(model, "fp8")


def with_lora(model: FluxTransformer) -> FluxTransformer:
    """Factors of rank 2 beside every large linear, as `load_lora` puts them there."""
    for name, linear in quantizable(model).items():
        owner, _, field = name.rpartition(".")
        a, b = linear.weight[:2].clone(), linear.weight[:, :2].clone()
        setattr(model.get_submodule(owner), field, AdaptedLinear(linear, a, b))
    return model


@pytest.mark.parametrize("change", [in_fp8, with_lora])
@pytest.mark.parametrize("case", ["plain", "padded", "taylor"])
def test_eager_loop_of_other_weights(watched, case, change):
    model, (jobs, settings) = change(make_dit(torch.bfloat16)), CASES[case]
    for job in draw(make_denoiser(model=model), *(make_job(model=model, **job, **settings) for job in jobs)):
        assert job.latents.isfinite().all()
    assert watched == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_eager_loop(watched, case, dtype):
    model, (jobs, settings) = make_dit(dtype), CASES[case]
    for job in draw(make_denoiser(model=model), *(make_job(model=model, **job, **settings) for job in jobs)):
        assert job.latents.isfinite().all()
    assert watched == [1]


def test_replayed_loop(watched):
    denoiser = make_denoiser(FakeRecorder())
    for seed in (1, 2):
        assert draw(denoiser, make_job(seed))[0].graphs.startswith("graph")
    assert watched == [1, 1]


def test_callbacks_get_tensors_and_no_numbers_from_the_device(watched):
    seen = []
    draw(make_denoiser(), make_job(1, on_step=lambda info: seen.append((info.step, info.sigma, info.latents.shape))))
    assert len(seen) == 6


def test_first_block_reads_one_number_a_sample_and_step(monkeypatch):
    """The documented exception: what to compute is decided on the host."""
    read, tolist = [], torch.Tensor.tolist
    loop = Denoiser._loop

    def watch(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda t: read.append(t.shape) or tolist(t))
            return loop(self, *args)

    monkeypatch.setattr(Denoiser, "_loop", watch)
    settings = {"cache": "first_block", "cache_threshold": 0.1, "true_cfg_scale": 2.0}
    draw(make_denoiser(), make_job(1, **settings), make_job(2, **settings))
    assert read == [(2,)] * 5


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: bool(t[0] > 0),
        lambda t: float(t[0]),
        lambda t: range(t[0].long()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.tensor([1.0, 2.0]),
        lambda t: torch.equal(t, t),
        lambda t: t.unique(),
        lambda t: t.masked_select(t > 0),
    ],
    ids=lambda f: str(f.__code__.co_firstlineno),
)
def test_the_watch_sees(wait):
    t = torch.arange(3.0)
    with torch.inference_mode(), pytest.raises(HostWaits), forbid_host_sync():
        wait(t)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("setting", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize(
    "settings", [{}, {"true_cfg_scale": 3.0}, {"cache": "taylor"}, {"cache": "first_block", "cache_threshold": 0.0}]
)
@pytest.mark.parametrize("lengths", [(7,), (5, 9)], ids=str)
@pytest.mark.parametrize("change", [lambda model: model, in_fp8, with_lora], ids=["bf16", "fp8", "lora"])
def test_on_a_gpu(monkeypatch, lengths, settings, setting, change):
    """The second request, so that kernels are compiled and graphs recorded."""
    if change is in_fp8 and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("this GPU has no e4m3")
    model = change(make_dit(torch.bfloat16, "cuda", attention_head_dim=64, axes_dims_rope=(8, 28, 28)))
    denoiser = make_denoiser(setting=setting, model=model)

    def jobs():
        return [make_job(seed, length, model, **settings) for seed, length in enumerate(lengths)]

    draw(denoiser, *jobs())
    loop = Denoiser._loop

    def watch(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loop(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Denoiser, "_loop", watch)
    for job in draw(denoiser, *jobs()):
        assert job.latents.isfinite().all()
