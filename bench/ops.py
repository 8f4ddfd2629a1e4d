"""Every registered op: ours, the plain torch reference, and `torch.compile` of that reference.

On a GPU the full-size `bench_cases` in bf16, forward and backward, as CUDA graphs over inputs that overflow the L2
cache; on a CPU smaller cases, forward only, in bf16 and fp32. Every side's error is taken against fp64, and ours
is held against what this device copies and multiplies in the same run.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ceilings
import pytest
import torch
from timing import interleave
from torch import Tensor

from uniworld.kernels import registry
from uniworld.kernels.attention_backends import available_backends, choose_backend
from uniworld.kernels.registry import Op, load_ops, use_backend

OPS = load_ops()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16,) if DEVICE == "cuda" else (torch.bfloat16, torch.float32)
MAX_SETS = 12
MIN_ROTATED_BYTES = 256 * 2**20  # several times the L2 cache of any GPU

# The sizes of the DiT in dit_step.py: 1,344 tokens, 1,024 wide. Ops that are not listed run their full-size cases.
CPU_CASES: dict[str, dict[str, int]] = {
    "adaln_modulate": {"B": 1, "L": 1344, "D": 1024},
    "gate_residual": {"B": 1, "L": 1344, "D": 1024},
    "gate_residual_adaln": {"B": 1, "L": 1344, "D": 1024},
    "gelu_linear": {"M": 1344, "K": 1024, "N": 4096},
    "adaln_modulate_fp8": {"B": 1, "L": 1344, "D": 1024},
    "gate_residual_adaln_fp8": {"B": 1, "L": 1344, "D": 1024},
    "quantize_rows": {"B": 1, "L": 1344, "D": 1024, "G": 4096},
    "fp8_linear": {"M": 1344, "K": 1024, "N": 4096},
    "connector_mlp": {"T": 256, "K": 896, "C": 3072, "N": 1024, "R": 576, "base": 1},
    "ema_update": {"num_matrices": 4, "width": 2048},
    "joint_attention": {"B": 1, "S": 1344, "H": 8, "Dh": 128, "ragged": 0},
    "qk_norm_rope": {"B": 1, "Li": 1024, "Lt": 320, "R": 1024, "H": 8, "Dh": 128},
    "varlen_attention": {"B": 1, "S": 1344, "H": 8, "Dh": 128, "ragged": 0},
}


def foreach_lerp(ema: list[Tensor], source: list[Tensor], decay: float) -> list[Tensor]:
    """What a trainer writes without a kernel of its own; a bf16 source has to be upcast first."""
    upcast = [s.float() for s in source]
    torch._foreach_lerp_(ema, upcast, 1 - decay)
    return ema


def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """torch's fused attention with the backend that torch picks; without lengths only."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


@dataclass(frozen=True)
class Peer:
    """Another way to compute an op, for the cases that it can do."""

    name: str
    fn: Callable[..., Any]
    fits: Callable[[dict[str, Any]], bool] = lambda inputs: True


PEERS = {
    "ema_update": Peer("torch._foreach_lerp_", foreach_lerp),
    "joint_attention": Peer("sdpa", sdpa, lambda inputs: inputs.get("lengths") is None),
}
FP8_PRODUCTS = {"fp8_linear"}  # held against a product in e4m3
# Ops whose first choice on a GPU is not Triton: both are measured, so that the choice can be checked.
TRITON_TOO = {"ema_update", "gelu_linear", "connector_mlp"}


def variants(op: Op) -> dict[str, Callable[..., Any]]:
    """Other ways of ours than the chosen one, on a GPU: the Triton kernel, and every attention backend."""
    if DEVICE == "cpu":
        return {}
    if op.name == "joint_attention":
        names = [name for name, missing in available_backends(DEVICE).items() if not missing and name != "math"]
        return {f"ours, {name}": functools.partial(op.fn, backend=name) for name in names}
    return {"ours, Triton": with_triton(op.fn)} if op.name in TRITON_TOO else {}


def sides_of(op: Op) -> list[str]:
    names = ["ours", "torch eager", "torch.compile"]
    if op.name in PEERS:
        names.append(PEERS[op.name].name)
    return names + list(variants(op))


def cases_of(op: Op) -> tuple[dict[str, int], ...]:
    return (CPU_CASES[op.name],) if DEVICE == "cpu" and op.name in CPU_CASES else op.bench_cases


def case_name(case: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


@pytest.mark.parametrize("index", range(len(DTYPES) + 2))
def test_ceiling(index, report):
    ceilings.report_one(report, "ops", DEVICE, DTYPES, index)


PARAMS = [
    pytest.param(op.name, index, dtype, backward, side, id=f"{op.name}-{index}-{str(dtype)[6:]}-{direction}-{side}")
    for backward, direction in ((False, "forward"), (True, "backward"))  # all forward passes first
    for op in OPS.values()
    for index, _ in enumerate(cases_of(op))
    for dtype in DTYPES
    if not backward or (DEVICE == "cuda" and op.differentiable)
    for side in sides_of(op)
]


@pytest.mark.parametrize("name, index, dtype, backward, side", PARAMS)
def test_op(name, index, dtype, backward, side, report):
    op = OPS[name]
    case = cases_of(op)[index]
    measured = measure(name, index, dtype, backward)[side]
    if isinstance(measured, BaseException):
        raise measured
    if measured is None:
        pytest.skip(f"{side} does not do this case")
    samples, error, backend = measured
    more = {"op": name, "backend": backend, "error": error, "error_is": "relative to fp64"}
    if not backward:
        scale = 1 if dtype == torch.bfloat16 or name == "ema_update" else 2  # `bytes_moved` counts bf16
        num_bytes, flops = scale * op.bytes_moved(case), op.flops(case)
        more |= {"gb_s": num_bytes / samples.median / 1e9, "tflop_s": flops / samples.median / 1e12}
        product = ceilings.gemm(DEVICE, dtype) if name not in FP8_PRODUCTS else ceilings.fp8_gemm(DEVICE)
        more |= ceilings.share(samples.median, num_bytes=num_bytes, flops=flops, product=product, device=DEVICE)
    direction = " forward + backward" if backward else ""
    report("ops", f"{name} {case_name(case)}{direction}", side, dtype, samples, **more)


@functools.cache
def measure(name: str, index: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """All sides of one op, timed in turn: (samples, error, backend) of each, the exception it raised, or None."""
    torch._dynamo.reset()
    op = OPS[name]
    case = cases_of(op)[index]
    results: dict[str, Any] = {}
    calls, errors = {}, {}
    sets = [make_inputs(op, case, dtype, backward, seed) for seed in range(num_sets(op, case))]
    truth = flat_outputs(op.decode(op.reference(**cast(fresh(op, case, dtype), torch.float64))))
    for side in sides_of(op):
        fn = function_of(op, side, sets[0])
        if fn is None:
            results[side] = None
            continue
        try:
            with torch.no_grad():
                outputs = flat_outputs(op.decode(fn(**fresh(op, case, dtype))))
                errors[side] = relative_error(outputs, truth)
            calls[side] = [call_of(op, fn, inputs, backward) for inputs in sets]
            calls[side][0]()
        except Exception as error:  # one side that fails must not hide the others
            calls.pop(side, None)
            results[side] = error
    timed = interleave(calls, graphs=True, device=DEVICE) if calls else {}
    for side, samples in timed.items():
        results[side] = (samples, errors[side], backend_of(op, side, sets[0]))
    return results


def function_of(op: Op, side: str, inputs: dict[str, Any]) -> Callable[..., Any] | None:
    if side == "ours":
        return op.fn
    if side in variants(op):
        return variants(op)[side]
    if side == "torch eager":
        return op.reference
    if side == "torch.compile":
        return torch.compile(op.reference, dynamic=False)
    peer = PEERS[op.name]
    return peer.fn if peer.fits(inputs) else None


def with_triton(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(**inputs: Any) -> Any:
        with use_backend("triton"):
            return fn(**inputs)

    return run


def backend_of(op: Op, side: str, inputs: dict[str, Any]) -> str:
    if not side.startswith("ours"):
        return "torch"
    if op.name == "joint_attention":
        q = inputs["q"]
        return side.partition(", ")[2] or choose_backend("auto", q.device, q.dtype, q.shape[-1]).name
    if side == "ours, Triton":
        return "triton"
    if not op.triton_builds and op.cpp is None:
        return "torch"
    first = next(t for t in leaves(inputs) if t.dtype in registry.KERNEL_DTYPES)
    return registry.backend_for(first, op.cpp)


def call_of(op: Op, fn: Callable[..., Any], inputs: dict[str, Any], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return fn(**inputs)

        return forward

    names = [n for n in op.differentiable if isinstance(inputs[n], Tensor)]
    with torch.no_grad():
        like = flat_outputs(op.reference(**inputs))
    grads = [torch.randn_like(o) for o in like]

    def forward_backward() -> object:
        outputs = [o for o in flat_outputs(fn(**inputs)) if o.requires_grad]
        matching = grads if len(outputs) == len(grads) else grads[: len(outputs)]
        return torch.autograd.grad(outputs, [inputs[n] for n in names], matching)

    return forward_backward


def num_sets(op: Op, case: dict[str, int]) -> int:
    """How many input sets one pass rotates through: one on a CPU, enough to overflow the L2 cache on a GPU."""
    if DEVICE == "cpu":
        return 1
    return min(MAX_SETS, math.ceil(MIN_ROTATED_BYTES / op.bytes_moved(case)) + 1)


def make_inputs(op: Op, case: dict[str, int], dtype: torch.dtype, backward: bool, seed: int) -> dict[str, Any]:
    inputs = fresh(op, case, dtype, seed)
    for name in op.differentiable if backward else ():
        if isinstance(inputs[name], Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs


def fresh(op: Op, case: dict[str, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return op.make_inputs(**case, dtype=dtype, device=DEVICE)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return type(value)(cast(v, dtype) for v in value) if isinstance(value, (list, tuple)) else value


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for child in children for leaf in leaves(child)]


def flat_outputs(value: Any) -> list[Tensor]:
    return leaves(value)


def relative_error(outputs: list[Tensor], truth: list[Tensor]) -> float:
    """||outputs - truth|| / ||truth|| over all outputs together."""
    difference = sum(float((o.double() - t).square().sum()) for o, t in zip(outputs, truth))
    return math.sqrt(difference / sum(float(t.square().sum()) for t in truth))
