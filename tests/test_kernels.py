"""Every registered op, on every backend that runs here: against fp64, compiled, and through `opcheck`."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from uniworld.kernels import extension
from uniworld.kernels.registry import INTERPRET, load_ops, use_backend

OPS = load_ops()
GPU = torch.cuda.is_available()


def backends(op):
    """What can run here apart from the reference; an op without kernels of its own runs as the user would run it."""
    found = []
    if op.triton_builds and (GPU or INTERPRET):
        found.append("triton")
    if op.cpp and extension.has(op.cpp):
        found.append("cpp")
    return found or ["auto"]


def device_of(backend):
    return "cuda" if GPU and backend != "cpp" else "cpu"


def map_tensors(function, value):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def fresh_inputs(op, case, dtype, device, cast=None):
    """The same inputs at each call, with the strides that the op's maker gave them; `cast` is for the fp64 run."""
    torch.manual_seed(0)
    inputs = op.make_inputs(**case, dtype=dtype, device=device)
    if cast:
        inputs = {k: map_tensors(lambda t: t.to(cast) if t.is_floating_point() else t, v) for k, v in inputs.items()}
    for name in op.differentiable:
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
    return inputs


def run(op, fn, inputs):
    """Named outputs and gradients of `fn`, for the same random output gradients each time.

    An op that has gradients runs once more without them: it may compute in another way then, and in place.
    """
    out = op.decode(fn(**inputs))
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    assert all(isinstance(o, Tensor) for o in outputs), f"{op.name} must return a tensor or a tuple of tensors"
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    names = [n for n in op.differentiable if isinstance(inputs.get(n), Tensor)]
    if names:
        generator = torch.Generator().manual_seed(1)
        pairs = [(o, torch.randn(o.shape, generator=generator)) for o in outputs]
        pairs = [(o, d.to(o.device, o.dtype)) for o, d in pairs if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], [inputs[n] for n in names], [d for _, d in pairs])
        results |= {f"gradient of {n}": g for n, g in zip(names, grads)}
        with torch.no_grad():
            out = fn(**{k: map_tensors(Tensor.detach, v) for k, v in inputs.items()})
        outputs = list(out) if isinstance(out, (tuple, list)) else [out]
        results |= {f"output {i} without gradient": o for i, o in enumerate(outputs)}
    return results


def largest(x):
    return x.abs().max()


def root_mean_square(x):
    return x.square().mean().sqrt()


def allowed_error(size, truth, plain, ours, backend, scale):
    """Twice plain torch's own error, plus the rounding of one store: the largest error a full unit in the last place
    of the largest value, the mean error (of enough values to have one) a quarter.

    Where the truth is zero because terms cancel (the gradient of q where there is one key), `scale` stands for the
    size of those terms.
    Triton's interpreter truncates where a GPU rounds when it stores bf16: one unit more, there only.
    """
    units = 2 if backend == "triton" and not GPU and ours.dtype == torch.bfloat16 else 1
    if size is root_mean_square and ours.numel() >= 64:
        units /= 4
    return 2 * size(plain.double() - truth) + units * torch.finfo(ours.dtype).eps * (size(truth) or scale)


def case_id(case):
    return "_".join(f"{k}{v}" for k, v in case.items())


CASES = [
    pytest.param(op, case, dtype, backend, id=f"{op.name}-{case_id(case)}-{str(dtype)[6:]}-{backend}")
    for op in OPS.values()
    for case in op.cases
    for dtype in (torch.float32, torch.bfloat16)
    for backend in backends(op)
]
EACH = [pytest.param(op, backend, id=f"{op.name}-{backend}") for op in OPS.values() for backend in backends(op)]


@pytest.mark.parametrize("op,case,dtype,backend", CASES)
def test_matches_fp64(op, case, dtype, backend):
    device = device_of(backend)
    truth = run(op, op.reference, fresh_inputs(op, case, dtype, device, cast=torch.float64))
    plain = run(op, op.reference, fresh_inputs(op, case, dtype, device))
    with use_backend(backend):
        ours = run(op, op.fn, fresh_inputs(op, case, dtype, device))
    assert ours.keys() == truth.keys()
    for name, result in ours.items():
        assert result.shape == truth[name].shape, name
        if result.numel() == 0:
            continue
        for size in (largest, root_mean_square):
            error = size(result.double() - truth[name])
            scale = max(size(t) for t in truth.values() if t.numel())
            bound = allowed_error(size, truth[name], plain[name], result, backend, scale)
            assert error <= bound, f"{name}: {size.__name__} error {error:.3e} > {bound:.3e}"


ROW_OPS = [n for n in ("adaln_modulate", "gate_residual", "gate_residual_adaln", "qk_norm_rope") if extension.has(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [0, 1], ids=["baseline", "avx2"])
@pytest.mark.parametrize("name", ROW_OPS)
def test_narrower_instruction_sets(name, level, dtype):
    before = extension.core().limit_instruction_set(level)
    try:
        for case in OPS[name].cases:
            test_matches_fp64(OPS[name], case, dtype, "cpp")
    finally:
        extension.core().limit_instruction_set(before)


class OnePercentOff(torch.autograd.Function):
    """1.01 * x in the forward pass (`forward`), or in the backward pass only."""

    @staticmethod
    def forward(ctx, x, in_forward):
        ctx.in_forward = in_forward
        return x * 1.01 if in_forward else x.clone()

    @staticmethod
    def backward(ctx, d):
        return d if ctx.in_forward else d * 1.01, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_forward", [True, False])
def test_notices_one_percent(dtype, in_forward):
    op = OPS["adaln_modulate"]
    wrong = dataclasses.replace(op, fn=lambda **inputs: OnePercentOff.apply(op.reference(**inputs), in_forward))
    with pytest.raises(AssertionError, match="output 0" if in_forward else "gradient of x"):
        test_matches_fp64(wrong, op.cases[-1], dtype, "auto")


@pytest.mark.parametrize("op,backend", EACH)
def test_compiles_without_graph_break(op, backend):
    torch._dynamo.reset()
    case, device = op.cases[-1], device_of(backend)
    with use_backend(backend):
        compiled = torch.compile(op.fn, fullgraph=True, backend="aot_eager")
        ours = run(op, compiled, fresh_inputs(op, case, torch.float32, device))
        eager = run(op, op.fn, fresh_inputs(op, case, torch.float32, device))
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], msg=lambda m, name=name: f"{name}: {m}")


class RecordCustomOps(TorchDispatchMode):
    """Keeps each call of one of our custom ops, with copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "uniworld":
            copies = {k: map_tensors(copy_leaf, v) for k, v in kwargs.items()}
            self.calls.append((func, map_tensors(copy_leaf, args), copies))
        return func(*args, **kwargs)


def copy_leaf(tensor):
    """A copy with equal strides that requires gradients where the call needed them, which is outside a backward."""
    in_backward = torch._C._current_graph_task_id() != -1
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad and not in_backward)


@pytest.mark.parametrize("op,backend", EACH)
def test_opcheck(op, backend):
    with use_backend(backend):
        with RecordCustomOps() as record:
            run(op, op.fn, fresh_inputs(op, op.cases[-1], torch.float32, device_of(backend)))
        if not record.calls and backend == "auto":
            pytest.skip(f"{op.name} has no custom op")
        assert record.calls, f"{op.name} ran none of its custom ops on {backend}"
        for func, args, kwargs in record.calls:
            torch.library.opcheck(func, args, kwargs)
