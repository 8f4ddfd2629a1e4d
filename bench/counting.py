"""What a call launches, computes and moves on a GPU, counted without one.

Calls run on fake tensors, which have shapes and no data, with our ops on the path that they take on a GPU: every op
that is called is seen and nothing is computed, so that the full size of FLUX takes seconds and no memory. An op that
only makes a view or allocates launches nothing; any other counts as one kernel, whoever it belongs to, unless
`LAUNCHES` says more. Attention and RMSNorm are one kernel each, as torch has them on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from uniworld.kernels.attention_backends import lengths_tensor
from uniworld.kernels.registry import use_backend

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# Kernels of our ops that launch more than one: `qk_norm_rope` one for each stream, the others as their source says.
LAUNCHES: dict[str, Callable[[tuple], int]] = {
    "uniworld::qk_norm_rope": lambda args: 1 if args[5] is None else 2,
    "uniworld::region_mse": lambda args: 2,
    "uniworld::connector_mlp": lambda args: 3,  # the rows that nobody writes, two products
    "uniworld::connector_mlp_": lambda args: 2,
}
# Bytes of an operand that a kernel does not touch: the values of a single stream stay in the projection's result.
UNREAD: dict[str, Callable[[tuple], int]] = {
    "uniworld::qk_norm_rope": lambda args: 0 if args[10] else stored_bytes(args[0]) // 3,
}
OVERWRITES = {"copy_", "fill_", "zero_"}  # in-place ops that do not read what they replace


@torch.library.custom_op("uniworld_bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, Dh] each, and the result."""
    return F.scaled_dot_product_attention(q, k, v)


@attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


@register_flop_formula(torch.ops.uniworld_bench.attention)
def _(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    B, H, S, Dh = q_shape
    return 2 * B * H * S * k_shape[2] * (Dh + v_shape[3])


@torch.library.custom_op("uniworld_bench::rms_norm", mutates_args=())
def rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
    return torch.rms_norm(x, normalized_shape, weight, eps)


@rms_norm.register_fake
def _(x, normalized_shape, weight, eps):
    return torch.empty_like(x)


class _AsOnGPU(TorchFunctionMode):
    """Calls what is one kernel on a GPU as one op; on a CPU, torch would take it apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            return torch.ops.uniworld_bench.attention(q, k, v)
        if func in (F.rms_norm, torch.rms_norm):
            x, shape, weight, eps = (*args, *kwargs.values(), None, None)[:4]
            return torch.ops.uniworld_bench.rms_norm(x, list(shape), weight, eps)
        return func(*args, **kwargs)


@dataclass
class Count:
    """kernels: by name of the op; num_bytes: of what they read and write, each operand once; flops: of the products."""

    kernels: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    flops: int = 0

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()


class _CountingMode(TorchDispatchMode):
    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and not name.startswith("prim::") and name.split("::")[1] not in NO_KERNEL:
            self.count.kernels[name] += LAUNCHES.get(name, lambda args: 1)(args)
            self.count.num_bytes += operand_bytes(func, args, kwargs or {}, result)
            self.count.num_bytes -= UNREAD.get(name, lambda args: 0)(args)
        return result


def operand_bytes(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Bytes of the tensors that a call reads and those that it writes; one that is changed in place counts as both."""
    read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    written = {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
    for argument, value in zip(func._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed = {id(t): t for t in tree_leaves(value) if isinstance(t, Tensor)}
            written |= changed
            if func._schema.name.split("::")[1] in OVERWRITES:
                read = {key: t for key, t in read.items() if key not in changed}
    return sum(stored_bytes(t) for t in (*read.values(), *written.values()))


def stored_bytes(t: Tensor) -> int:
    """Bytes of the elements that lie in memory: an expanded dimension is stored once."""
    return t.itemsize * torch.Size(n for n, stride in zip(t.shape, t.stride()) if stride or n == 0).numel()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made in here have no data, and our ops take their path of a GPU."""
    lengths_tensor.cache_clear()  # it keeps tensors, which must not get from one world into the other
    try:
        with FakeTensorMode(), torch.no_grad(), use_backend("triton"):  # inference mode would show composite ops whole
            yield
    finally:
        lengths_tensor.cache_clear()


def count(call: Callable[[], Any]) -> Count:
    """Count one call on fake tensors."""
    found = Count()
    with _AsOnGPU(), FlopCounterMode(display=False) as flops, _CountingMode(found):
        call()
    found.flops = flops.get_total_flops()
    return found
