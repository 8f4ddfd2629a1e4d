"""What a device does at best, measured in the run whose rows are held against it: copying, and matrix products."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timing import Samples, interleave
from torch import Tensor

from uniworld.engine.quantize import FP8_CAPABILITY
from uniworld.kernels.quantize_rows import E4M3

# Bytes copied from and the side of the matrices, by device: beyond every cache, and large enough for the full rate.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
GEMM_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Ceiling:
    """rate: bytes read and written a second, or FLOP/s."""

    name: str
    dtype: torch.dtype
    samples: Samples
    amount: float
    unit: str  # "gb_s" or "tflop_s", the field of a row

    @property
    def rate(self) -> float:
        return self.amount / self.samples.median

    def figures(self) -> dict[str, float]:
        return {self.unit: self.rate / (1e9 if self.unit == "gb_s" else 1e12)}


@functools.cache
def copy(device: str, num_bytes: int | None = None) -> Ceiling:
    """Copying a tensor: every byte is read once and written once."""
    num_bytes = num_bytes or COPY_BYTES[device]
    source = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    samples = _timed(lambda: target.copy_(source), device)
    return Ceiling("copy", torch.bfloat16, samples, 2.0 * source.nbytes, "gb_s")


@functools.cache
def gemm(device: str, dtype: torch.dtype, size: int | None = None) -> Ceiling:
    """A square matrix product on random data."""
    size = size or GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    name = f"{str(dtype).removeprefix('torch.')} GEMM {size}"
    return Ceiling(name, dtype, _timed(lambda: a @ b, device), 2.0 * size**3, "tflop_s")


@functools.cache
def fp8_gemm(device: str) -> Ceiling | None:
    """A square product of e4m3 matrices, scaled by row, as `fp8_linear` calls it; None where there is none."""
    if device != "cuda" or torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return None
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(E4M3) for _ in range(2))
    samples = _timed(functools.partial(fp8_product, a, b, torch.ones(size, 1, device=device)), device)
    return Ceiling(f"fp8 GEMM {size}", torch.bfloat16, samples, 2.0 * size**3, "tflop_s")


def fp8_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """a @ b.T in bf16: [N, N] e4m3 each, and one scale [N, 1] for the rows of both."""
    scales = {"scale_a": scale, "scale_b": scale.t()}
    return torch._scaled_mm(a, b.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _timed(call: Callable[[], object], device: str) -> Samples:
    return interleave({"": [call]}, rounds=9, sample_s=0.02, device=device)[""]


def report_one(
    report: Callable,
    bench: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    index: int,
    copy_bytes: int | None = None,
) -> None:
    """Write the row of one ceiling by its number: copying, a product in each dtype, a product in e4m3."""
    makers = [lambda: copy(device, copy_bytes), *(functools.partial(gemm, device, dtype) for dtype in dtypes)]
    ceiling = [*makers, lambda: fp8_gemm(device)][index]()
    if ceiling is None:
        pytest.skip("e4m3 products need a GPU of sm_89 or newer")
    report(bench, f"ceiling, {ceiling.name}", "torch", ceiling.dtype, ceiling.samples, **ceiling.figures())


def share(
    seconds: float,
    *,
    num_bytes: float,
    device: str,
    flops: float = 0.0,
    product: Ceiling | None = None,
    copy_bytes: int | None = None,
) -> dict[str, float | str]:
    """How near a call comes to what bounds it: the longer of the times that its bytes and its FLOPs take at best.

    Returns: `of_ceiling`, that time over `seconds`, and `ceiling`, whose it is.
    """
    copied = copy(device, copy_bytes)
    bounds = {copied.name: num_bytes / copied.rate}
    if product is not None:
        bounds[product.name] = flops / product.rate
    name = max(bounds, key=bounds.get)
    return {"of_ceiling": bounds[name] / seconds, "ceiling": name}
