"""UniWorld-V1 at full size on a GPU, random weights, bf16: DiT steps and whole requests against diffusers.

`UNIWORLD_BENCH_SIZE=tiny` runs the same code at the size of `tiny` on any device: a dry run, whose rows are marked so.
Without diffusers the DiT steps of ours are still measured; the requests need its VAE.
"""

import functools
import gc
import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch
from full_model import FULL_SIZE, TINY_SIZE, denoiser_config, random_uniworld
from peers import MISSING, diffusers_flux, random_flux, relative_error, run_diffusers, same_attention
from PIL import Image
from timing import Call, Samples, capture, interleave

from uniworld.engine import Engine
from uniworld.engine.cache import ConditioningCache
from uniworld.engine.compiled import compile_blocks
from uniworld.engine.quantize import FP8_CAPABILITY, quantized_copy
from uniworld.models import flow
from uniworld.models.flux import FluxTransformer

CUDA = torch.cuda.is_available()
FULL = os.environ.get("UNIWORLD_BENCH_SIZE", "full") != "tiny"
SIZE = FULL_SIZE if FULL else TINY_SIZE
DEVICE, DTYPE = ("cuda" if CUDA else "cpu"), (torch.bfloat16 if CUDA else torch.float32)
BENCH = "full_scale" if FULL else "full_scale_dry_run"
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
NUM_STEPS = 28 if FULL else 3
PROMPT = "Make it look like a watercolour painting of a quiet harbour in the evening, with warm light on the water"

pytestmark = pytest.mark.skipif(FULL and not CUDA, reason="full size needs a CUDA device (UNIWORLD_BENCH_SIZE=tiny)")


@dataclass(frozen=True)
class Case:
    """One picture size, from text alone or as an edit of one reference."""

    task: str
    size_px: int

    @property
    def num_img(self) -> int:
        return (self.size_px // flow.TOKEN_PX) ** 2

    @property
    def num_txt(self) -> int:
        """VLM and T5 tokens, and 1,024 semantic ones for a reference picture."""
        return 320 + (1280 if self.task == "edit" else 0)

    @property
    def num_tokens(self) -> int:
        return self.num_img + self.num_txt

    @property
    def flops(self) -> float:
        """Of one DiT forward at full size, linear and attention terms."""
        return 1.291e10 * self.num_tokens + 7.004e5 * self.num_tokens**2

    def __str__(self) -> str:
        return f"{self.task}, {self.size_px} px"


CASES = [Case(task, size) for size in ((512, 1024) if FULL else (128,)) for task in ("text to image", "edit")]
GRAPH, FP8, CACHED = "ours, CUDA graph", "ours, fp8", "ours, taylor cache"
STEP_SIDES = ("ours", "ours compiled", GRAPH, FP8, "diffusers eager", "diffusers compiled")
REQUEST_SIDES = ("ours", CACHED, "diffusers eager", "diffusers compiled")


@functools.cache
def gemm() -> Samples:
    """A bf16 matrix product of 8192 in each dimension on random data: the rate that all others are held against."""
    size = 8192 if FULL else 256
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return interleave({"gemm": [lambda: a @ b]}, rounds=9, sample_s=0.05, device=DEVICE)["gemm"]


def gemm_tflop_s() -> float:
    size = 8192 if FULL else 256
    return 2 * size**3 / gemm().median / 1e12


def test_gemm(report):
    report(BENCH, "bf16 GEMM 8192", "torch", torch.bfloat16, gemm(), tflop_s=gemm_tflop_s())


@pytest.mark.parametrize("side", STEP_SIDES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case, side, report):
    if side.startswith("diffusers") and not HAS_DIFFUSERS:
        pytest.skip(MISSING)
    if side == GRAPH and not CUDA:
        pytest.skip("needs a CUDA device")
    measured = steps()[case, side]
    if isinstance(measured, BaseException):
        raise measured
    samples, peak_gib, error = measured
    rate = case.flops / samples.median / 1e12
    more = {"tokens": case.num_tokens, "tflop_s": rate, "of_gemm": rate / gemm_tflop_s(), "peak_gib": peak_gib}
    if error is not None:
        more |= {"error": error, "error_is": "relative to diffusers in fp32"}
    report(BENCH, f"step, {case}", side, DTYPE, samples, **more)


@functools.cache
def steps() -> dict:
    """(samples, peak GiB, error) of every case and side, or the exception that a side raised."""
    truths = fp32_truths() if HAS_DIFFUSERS else {}
    free()
    ours = random_flux(denoiser_config(SIZE), DTYPE, DEVICE)
    models = peer_models(ours)
    compiled = compiled_flux(ours)
    fp8 = quantized_copy(ours, "fp8") if has_e4m3() else None
    results = {}
    for case in CASES:
        inputs = step_inputs(case, ours, DTYPE)
        calls = {"ours": prepared_step(ours, inputs), "ours compiled": prepared_step(compiled, inputs)}
        if fp8 is None:
            results[case, FP8] = NotImplementedError("e4m3 needs sm_89 or newer")
        else:
            calls[FP8] = prepared_step(fp8, inputs)
        calls |= {side: functools.partial(peer_step, model, inputs) for side, model in models.items()}
        if CUDA:
            calls[GRAPH] = replayed(calls["ours"])
        done, runnable = {}, {}
        for side, call in calls.items():
            try:
                done[side] = measure_once(call)  # compiles, where a side does
                runnable[side] = [call]
            except Exception as error:  # one side that fails must not hide the others
                results[case, side] = error
        with torch.inference_mode():
            samples = interleave(runnable, rounds=9, sample_s=0.1, device=DEVICE)
        for side in runnable:
            prediction, peak = done[side]
            error = relative_error(prediction, truths[case]) if case in truths else None
            results[case, side] = (samples[side], peak, error)
    del ours, compiled, models, fp8
    free()
    return results


def has_e4m3() -> bool:
    return not CUDA or torch.cuda.get_device_capability() >= FP8_CAPABILITY


def peer_models(ours: FluxTransformer) -> dict:
    """diffusers' model twice on our weights: as it is, and with its repeated blocks compiled."""
    if not HAS_DIFFUSERS:
        return {}
    eager, compiled = diffusers_flux(ours, DEVICE), diffusers_flux(ours, DEVICE)
    torch._dynamo.reset()
    compiled.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return {"diffusers eager": eager, "diffusers compiled": compiled}


def compiled_flux(ours: FluxTransformer) -> FluxTransformer:
    """Ours a second time, on the same weights, with its blocks compiled as `Engine(compile=True)` does."""
    with torch.device("meta"):
        twin = FluxTransformer(ours.config)
    twin.load_state_dict(ours.state_dict(), assign=True)
    twin.eval().requires_grad_(False)
    compile_blocks(twin)
    return twin


def fp32_truths() -> dict[Case, torch.Tensor]:
    """diffusers' predictions in fp32, from the same bf16 values of the weights."""
    model = random_flux(denoiser_config(SIZE), torch.float32, DEVICE)
    peer = diffusers_flux(model, DEVICE)
    with torch.inference_mode():
        return {case: run_diffusers(peer, **step_inputs(case, model, torch.float32)).cpu() for case in CASES}


def step_inputs(case: Case, model: FluxTransformer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs of one prediction. diffusers rounds 1000 times timestep and guidance to bf16; these are exact in it."""
    generator = torch.Generator().manual_seed(case.num_tokens)
    config = model.config

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE, dtype)

    return {
        "img": normal(1, case.num_img, config.in_channels),
        "txt": normal(1, case.num_txt, config.joint_attention_dim),
        "pooled": normal(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=DEVICE, dtype=dtype),
        "guidance": torch.tensor([4.0], device=DEVICE, dtype=dtype),
        "img_ids": flow.image_ids(case.size_px, case.size_px, DEVICE),
    }


def prepared_step(model: FluxTransformer, inputs: dict[str, torch.Tensor]) -> Call:
    """One step as the engine's loop runs it, text and modulation prepared."""
    with torch.inference_mode():
        txt = model.embed_txt(inputs["txt"])
        row = model.modulation(inputs["timestep"][:, None], inputs["guidance"], inputs["pooled"])[0]
        pe = model.rope(inputs["img_ids"])

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model.denoise(inputs["img"], txt, row, pe)

    return step


def replayed(step: Call) -> Call:
    """`step` as a CUDA graph, recorded at the first call; the result is the one that each replay overwrites."""
    made = {}

    def call() -> torch.Tensor:
        if not made:
            made["replay"] = capture(lambda: made.update(result=step()))
        made["replay"]()
        return made["result"]

    return call


def peer_step(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode(), same_attention(DEVICE):
        return run_diffusers(model, **inputs)


def measure_once(call: Call, repeat: bool = True) -> tuple[torch.Tensor, float | None]:
    """Result of a call, and the peak of allocated memory in GiB, of a second call where asked; no peak on a CPU."""
    if not CUDA:
        return call(), None
    if repeat:
        call()
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() / 2**30


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def request_sides(case: Case) -> tuple[str, ...]:
    """The compiled peer only at the largest size: every shape costs it a compilation."""
    return REQUEST_SIDES if case.size_px == CASES[-1].size_px else REQUEST_SIDES[:3]


@pytest.mark.skipif(not HAS_DIFFUSERS, reason=f"{MISSING}; requests need its VAE")
@pytest.mark.parametrize(
    "case, side", [pytest.param(case, side, id=f"{case}-{side}") for case in CASES for side in request_sides(case)]
)
def test_request(case, side, report):
    measured = requests()[case, side]
    if isinstance(measured, BaseException):
        raise measured
    samples, peak_gib, rooms, error = measured
    more = {"steps": NUM_STEPS, "peak_gib": peak_gib}
    if rooms:
        more["rooms_s"] = rooms
    if error is not None:
        more |= {"error": error, "error_is": "final latents, relative to diffusers eager"}
    report(BENCH, f"request, {case}", side, DTYPE, samples, **more)


@functools.cache
def requests() -> dict:
    """(samples, peak GiB, seconds by room, error) of every whole request and side, or the exception raised."""
    from original import OriginalPipeline

    model = random_uniworld(SIZE, DEVICE, DTYPE)
    engine = Engine(model)
    peers = {side: OriginalPipeline(model, peer) for side, peer in peer_models(model.denoiser).items()}
    noise = torch.randint(0, 256, (512, 512, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())
    results = {}
    for case in CASES:
        images = [picture] if case.task == "edit" else []
        settings = {"height": case.size_px, "width": case.size_px, "num_inference_steps": NUM_STEPS, "seed": 7}
        calls = {"ours": functools.partial(draw_ours, engine, images, settings)}
        calls[CACHED] = functools.partial(draw_ours, engine, images, settings | {"cache": "taylor"})
        calls |= {side: functools.partial(draw_theirs, peer, images, settings) for side, peer in peers.items()}
        calls = {side: call for side, call in calls.items() if side in request_sides(case)}
        done, runnable = {}, {}
        for side, call in calls.items():
            try:
                done[side] = measure_once(call, repeat=False)
                runnable[side] = [call]
            except Exception as error:  # as above
                results[case, side] = error
        samples = interleave(runnable, rounds=2, sample_s=0.0, device=DEVICE, warmup=0)
        reference = done["diffusers eager"][0][0] if "diffusers eager" in done else None
        for side in runnable:
            (latents, rooms), peak = done[side]
            error = None if reference is None or side == "diffusers eager" else relative_error(latents, reference)
            results[case, side] = (samples[side], peak, rooms, error)
    return results


def draw_ours(engine: Engine, images: list, settings: dict) -> tuple[torch.Tensor, dict[str, float]]:
    engine.conditioner.cache = ConditioningCache()
    result = engine.edit(images, PROMPT, **settings) if images else engine.generate(PROMPT, **settings)
    return result.latents, result.timings


def draw_theirs(peer, images: list, settings: dict) -> tuple[torch.Tensor, None]:
    with same_attention(DEVICE):
        return peer.draw(images, PROMPT, **settings)[0], None
