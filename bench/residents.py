"""Memory of one side among several that are on the device together."""

import gc
import traceback
from collections.abc import Iterator

import torch
from timing import Call
from torch import Tensor, nn


def own_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of modules, memory that several of them view counted once."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            for plain in plain_tensors(tensor):
                storage = plain.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor consists of where it is one of a library's own class, such as torchao's quantized weights."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def measure_once(call: Call, own: int, device: str, *, once: bool = False) -> tuple[object, float | None]:
    """Result of a call, and the peak in GiB of its side alone: its own weights, and what the call adds to all others.

    Args:
        own: bytes of the side's weights, which may be those of other sides too.
        once: measure the first call: a CUDA graph's memory is allocated while it is recorded. Else the second, since
            compiling takes memory that later calls do not.

    Returns: no peak on a CPU.
    """
    if device != "cuda":
        return call(), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    if not once:
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, (own + torch.cuda.max_memory_allocated() - before) / 2**30


def without_frames(error: Exception) -> Exception:
    """An exception to keep: its traceback, which would keep models and tensors alive, is printed and taken away."""
    traceback.print_exception(error)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
