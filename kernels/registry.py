"""The list of ops that tests and benchmarks walk, and the choice of backend for each call."""

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from uniworld.kernels import extension

BACKENDS = ("triton", "cpp", "torch")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # `DType` of csrc/core.h
KERNEL_DTYPES = tuple(DTYPE_CODES)

_forced = os.environ.get("UNIWORLD_KERNELS", "auto")
if _forced not in ("auto", *BACKENDS):
    raise ValueError(f"UNIWORLD_KERNELS={_forced!r}: must be one of auto, {', '.join(BACKENDS)}")


@dataclass(frozen=True, kw_only=True)
class TritonBuild:
    """One ahead-of-time compilation of a Triton kernel, at the sizes of the full model.

    `signature` maps each argument to "*bf16", "*fp32", "*i64", "i32", "fp32", ... or "constexpr"; pointers and i32
    sizes are taken to be divisible by 16, as they are at full scale. `capabilities` are the compute capabilities that
    run it with these tile sizes.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)


def triton_build(
    kernel: Any,
    constexprs: dict[str, Any],
    *,
    element: str = "*bf16",
    fp32: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> TritonBuild:
    """A `TritonBuild` whose signature follows from the kernel's argument names.

    Names ending in `_ptr` point to `element`, or to fp32 where listed; `constexprs` are compile-time; others are i32.
    """

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return "i32" if not name.endswith("_ptr") else "*fp32" if name in fp32 else element

    signature = {name: kind(name) for name in inspect.signature(kernel.fn).parameters}
    return TritonBuild(
        kernel=kernel, signature=signature, constexprs=constexprs, num_warps=num_warps, num_stages=num_stages
    )


@dataclass(frozen=True, kw_only=True)
class Op:
    """What tests and benchmarks need to know about one op.

    `fn` and `reference` take the keyword arguments that `make_inputs(**case, dtype=, device=)` returns, and return a
    tensor or a tuple of tensors. `differentiable` names the inputs whose gradients are tested (empty: no backward).
    `bytes_moved(case)` is the least traffic in bytes at bf16 and `flops(case)` the arithmetic of the forward pass.
    `cpp` names the function of the C++ core that serves CPU tensors, if there is one. `decode` turns results into the
    tensors whose values are compared, where they are not yet: quantized rows.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    cases: tuple[dict[str, int], ...]
    bench_cases: tuple[dict[str, int], ...]
    bytes_moved: Callable[[dict[str, int]], int]
    flops: Callable[[dict[str, int]], int] = field(default=lambda case: 0)
    differentiable: tuple[str, ...] = ()
    triton_builds: tuple[TritonBuild, ...] = ()
    cpp: str | None = None
    decode: Callable[[Any], Any] = field(default=lambda results: results)


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    if op.name in OPS:
        raise KeyError(f"op {op.name!r} is registered twice")
    OPS[op.name] = op


def load_ops() -> dict[str, Op]:
    """Import every module of this package, so that each registers its ops; returns `OPS`."""
    package = importlib.import_module("uniworld.kernels")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"uniworld.kernels.{module}")
    return OPS


def backend_for(x: Tensor, cpp: str | None = None) -> str:
    """Which backend serves this call: "triton" on CUDA, "cpp" on the CPU where built, "torch" else.

    `UNIWORLD_KERNELS` and `use_backend` force one; a forced backend that cannot run here raises, so that nothing
    falls back silently. fp64 and integer tensors always take the torch reference.
    """
    if x.dtype not in KERNEL_DTYPES or _forced == "torch":
        return "torch"
    can_cpp = x.device.type == "cpu" and cpp is not None and extension.has(cpp)
    if _forced == "triton":
        if not (x.is_cuda or INTERPRET or is_fake(x)):  # a fake tensor is traced, and no kernel runs
            raise RuntimeError(f"UNIWORLD_KERNELS=triton needs a CUDA tensor or TRITON_INTERPRET=1, got {x.device}")
        return "triton"
    if _forced == "cpp":
        if not can_cpp:
            raise RuntimeError(f"UNIWORLD_KERNELS=cpp: {cpp or 'this op'} has no C++ version here. {extension.MISSING}")
        return "cpp"
    if x.is_cuda:
        return "triton"
    return "cpp" if can_cpp else "torch"


def uses_cpp(x: Tensor, cpp: str) -> bool:
    """Inside a custom op: true for the C++ core, false for Triton.

    The public functions send the "torch" backend to the reference, so it arrives here only when a recorded call (a
    backward pass, a compiled graph) outlives the choice under which it was made.
    """
    backend = backend_for(x, cpp)
    if backend == "torch":
        raise RuntimeError(f"{cpp}: recorded with kernels, cannot run with the torch backend on {x.device}")
    return backend == "cpp"


def channels_last(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension; a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forced_backend() -> str:
    """The backend that `UNIWORLD_KERNELS` or `use_backend` forces, or "auto"."""
    return _forced


@contextmanager
def use_backend(name: str):
    """Force one backend ("triton", "cpp", "torch" or "auto") inside a `with` block; for tests and benchmarks."""
    global _forced
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend={name!r}: must be one of auto, {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
