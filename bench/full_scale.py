"""UniWorld-V1 at full size on a GPU, random weights, bf16: DiT steps and whole requests against diffusers.

Cases are measured one after the other, the most wanted first, each with its sides in turn; its rows are written before
the next case starts, and a case whose rows are there already, of this commit and device, is passed over.
`UNIWORLD_BENCH_SIZE=tiny` runs the same code at the size of `tiny` on any device: a dry run, whose rows are marked so.
Without diffusers the DiT steps of ours are still measured; requests need its VAE.
"""

import functools
import os

import ceilings
import pytest
import torch
from deadline import Missing, NoTime
from full_cases import FULL, TOY, Case
from full_requests import ONE_BY_ONE, OURS, OUTSIDE, TOGETHER, RequestBench, request_sides
from full_steps import Measured, StepBench, has_diffusers, step_sides
from peers import MISSING
from residents import free

CUDA = torch.cuda.is_available()
SCALE = TOY if os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny" else FULL
DEVICE, DTYPE = ("cuda" if CUDA else "cpu"), (torch.bfloat16 if CUDA else torch.float32)
BENCH = SCALE.bench
LARGEST_PX = max(SCALE.sides_px)

pytestmark = pytest.mark.skipif(
    SCALE is FULL and not CUDA, reason="full size needs a CUDA device (UNIWORLD_BENCH_SIZE=tiny)"
)


def pairs(cases: tuple[Case, ...], sides_of) -> list:
    """All sides of a case, then those of the next."""
    return [pytest.param(case, side, id=f"{case}-{side}") for case in cases for side in sides_of(case, LARGEST_PX)]


@functools.cache
def step_bench() -> StepBench:
    return StepBench(SCALE, DEVICE, DTYPE)


@functools.cache
def step(case: Case) -> dict[str, Measured | Exception]:
    return step_bench().measure(case)


@functools.cache
def request_bench() -> RequestBench:
    step_bench.cache_clear()  # its models make room
    free()
    return RequestBench(SCALE, DEVICE, DTYPE)


@functools.cache
def request_of(case: Case) -> dict[str, Measured | Exception]:
    return request_bench().measure(case)


@functools.cache
def served(case: Case) -> dict[str, Measured]:
    return request_bench().together(case)


@functools.cache
def gemm() -> ceilings.Ceiling:
    return ceilings.gemm(DEVICE, torch.bfloat16, SCALE.gemm)


def test_gemm(report):
    report(BENCH, f"ceiling, {gemm().name}", "torch", torch.bfloat16, gemm().samples, **gemm().figures())


@pytest.mark.parametrize("case, side", pairs(SCALE.step_cases, step_sides))
def test_step(case, side, report, written, report_missing):
    name = f"step, {case}"
    pass_over(name, step_sides(case, LARGEST_PX), written)
    measured = succeeded(name, side, step(case)[side], report_missing)
    median = measured.samples.median
    more = {"tokens": case.num_tokens, "batch": case.batch, "samples_per_s": case.batch / median}
    if SCALE is FULL:  # F(S) is that of the full size
        rate = case.flops / median / 1e12
        more |= {"tflop_s": rate, "of_gemm": rate * 1e12 / gemm().rate}
    more |= {"peak_gib": measured.peak_gib, "attention": measured.attention}
    if measured.error is not None:
        more |= {"error": measured.error, "error_is": measured.error_is}
    report(BENCH, name, side, DTYPE, measured.samples, **more)


def pass_over(name: str, sides: tuple[str, ...], written) -> None:
    """End the test of a side whose case has all of its rows."""
    if written(BENCH, name, DTYPE) >= set(sides):
        pytest.skip("has its rows already")


def succeeded(name: str, side: str, measured: Measured | Exception, report_missing) -> Measured:
    """What was measured; else a row that says why nothing was, unless it only has to wait, and the end of the test."""
    if not isinstance(measured, Exception):
        return measured
    if isinstance(measured, NoTime):
        pytest.skip(str(measured))
    missing = isinstance(measured, Missing)
    report_missing(BENCH, name, side, DTYPE, str(measured) if missing else f"failed: {first_line(measured)}")
    if missing:
        pytest.skip(str(measured))
    raise measured


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


needs_vae = pytest.mark.skipif(not has_diffusers(), reason=f"{MISSING}; requests need its VAE")


@needs_vae
@pytest.mark.parametrize("case", SCALE.request_cases[:2], ids=str)
def test_overhead(case, report, written):
    """A request's time outside of every model: tokens, pictures, connectors, noise, the host's work between them."""
    name = f"request outside of the models, {case}"
    pass_over(name, (OURS,), written)
    samples, seconds = request_bench().overhead(case)
    outside_s = {part: seconds.pop(part) for part in OUTSIDE if part in seconds}
    more = {"steps": SCALE.overhead_steps, "models_s": seconds, "outside_s": outside_s}
    report(BENCH, name, OURS, DTYPE, samples, **more)


@needs_vae
@pytest.mark.parametrize("case, side", pairs(SCALE.request_cases, request_sides))
def test_request(case, side, report, written, report_missing):
    name = f"request, {case}"
    pass_over(name, request_sides(case, LARGEST_PX), written)
    measured = succeeded(name, side, request_of(case)[side], report_missing)
    more = {"steps": SCALE.num_steps, "peak_gib": measured.peak_gib, "attention": measured.attention}
    more |= measured.more
    if measured.error is not None:
        more |= {"error": measured.error, "error_is": "final latents, relative to diffusers eager"}
    report(BENCH, name, side, DTYPE, measured.samples, **more)


@needs_vae
@pytest.mark.parametrize("side", (TOGETHER, ONE_BY_ONE))
@pytest.mark.parametrize("case", SCALE.served_cases, ids=str)
def test_requests_together(case, side, report, written):
    """Throughput of a server: edits that wait together, of unequal lengths, in one call."""
    name = f"requests, {case}"
    pass_over(name, (TOGETHER, ONE_BY_ONE), written)
    measured = served(case)[side]
    samples = measured.samples
    more = {"steps": SCALE.num_steps, "batch": case.batch, "pictures_per_s": case.batch / samples.median}
    more["attention"] = measured.attention
    if measured.error is not None:
        more |= {"error": measured.error, "error_is": "final latents, relative to requests alone"}
    report(BENCH, name, side, DTYPE, samples, **more)
