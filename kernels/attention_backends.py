"""Which attention kernels run here, which one is chosen, and how each is called.

Letters: B batch, S tokens, H heads, Dh head channels.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uniworld.kernels import attention_bf16, extension
from uniworld.kernels.registry import INTERPRET

BACKENDS = ("flash4", "flash3", "flash2", "xformers", "cudnn", "flash_sdpa", "cpu_bf16", "sdpa", "math", "triton")
# (module, function) of the backends that are packages of their own, in the order tried.
LIBRARIES = {
    "flash4": (("flash_attn.cute", "flash_attn_func"),),
    "flash3": (("flash_attn_interface", "flash_attn_func"), ("flash_attn_3.flash_attn_interface", "flash_attn_func")),
    "flash2": (("flash_attn", "flash_attn_func"),),
    "xformers": (("xformers.ops", "memory_efficient_attention"),),
}
# "auto" takes the first that runs, by major compute capability; 0 is no CUDA device. Hopper: the order of published
# forward rates (flash3 and cuDNN use wgmma and TMA, flash2 and the flash kernel inside torch do not); not measured here
# yet.
AUTO_ORDER = {
    0: ("cpu_bf16", "sdpa"),
    8: ("flash2", "flash_sdpa", "xformers", "cudnn", "sdpa"),
    9: ("flash3", "flash4", "cudnn", "flash2", "flash_sdpa", "xformers", "sdpa"),
    10: ("flash4", "cudnn", "flash2", "flash_sdpa", "xformers", "sdpa"),
}
# The same for batches of unequal lengths on a CUDA device, among those that take one in one call (cuDNN does not: it
# runs once a sample). Libraries before our kernel, which is simpler than theirs; not measured here yet.
RAGGED_ORDER = ("flash3", "flash2", "flash_sdpa", "xformers", "triton")
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash_sdpa": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that attention uses, and why it was chosen.

    ragged: what serves a batch of unequal lengths in one call, where no gradient is needed; "": `name`, once a sample.
    """

    name: str
    why: str
    ragged: str = ""


@cache
def load_library(name: str) -> tuple[Callable | None, str]:
    """(function, "") of a backend in `LIBRARIES`, or (None, why it cannot be imported)."""
    reasons = []
    for module, function in LIBRARIES[name]:
        try:
            return getattr(importlib.import_module(module), function), ""
        except Exception as error:  # also what a library built for another torch raises: OSError, RuntimeError, ...
            reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return None, reasons[0]


def capability(device: torch.device) -> int:
    """Major compute capability of a CUDA device; 0 for any other."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def why_missing(name: str, device: torch.device) -> str:
    """Why a backend cannot run on this device; "" where it can."""
    if name in ("sdpa", "math") or (name == "flash_sdpa" and device.type == "cpu"):
        return ""
    if name == "cpu_bf16":
        return attention_bf16.why_missing() if device.type == "cpu" else "needs a CPU"
    if name == "triton" and INTERPRET:
        return ""
    if device.type != "cuda":
        return "needs a CUDA device"
    lowest = {"flash4": 9, "flash3": 9, "xformers": 7}.get(name, 8)
    if capability(device) < lowest or (name == "flash3" and capability(device) != 9):
        return f"needs compute capability {'9' if name == 'flash3' else f'{lowest} or more'}, not {capability(device)}"
    if name in LIBRARIES:
        return load_library(name)[1]
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if name == "flash_sdpa" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without flash attention"
    return ""


def why_unsuited(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why an available backend cannot serve these tensors; "" where it can."""
    if name in ("sdpa", "math") or (name == "flash_sdpa" and device.type == "cpu"):
        return ""
    if name == "cpu_bf16":
        return attention_bf16.why_unsuited(dtype, head_dim)
    if name == "triton":
        return "" if dtype in (torch.bfloat16, torch.float32) else f"needs bfloat16 or float32, not {dtype}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    widest = 128 if name in ("cudnn", "flash4") else 256
    if head_dim % 8 or head_dim > widest:
        return f"needs a head_dim that is a multiple of 8 and at most {widest}, not {head_dim}"
    return ""


def why_not_auto(name: str) -> str:
    """Why "auto" passes over a backend that could run; "" where it does not."""
    if name == "cpu_bf16" and "amx_bf16" in extension.CPU_FEATURES:
        return "this CPU has AMX, which torch's own kernel uses"
    return ""


def why_not_ragged(name: str, device: torch.device) -> str:
    """Why a backend that runs cannot take a batch of unequal lengths in one call; "" where it can."""
    if name not in RAGGED and name != "triton":
        return "has no call for unequal lengths"
    if name == "flash_sdpa" and device.type != "cuda":
        return "has none on a CPU"
    if name == "flash_sdpa" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "needs torch 2.10 or newer"
    return ""


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Every backend, with "" where it runs on this device and else the reason why not."""
    device = torch.device(device)
    return {name: why_missing(name, device) for name in BACKENDS}


@cache
def choose_backend(requested: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """The backend for attention on these tensors; found once and kept.

    Args:
        requested: "auto" or one of `BACKENDS`.
        device: where the tensors are.
        dtype: their dtype.
        head_dim: channels of a head.

    Raises:
        ValueError: `requested` is unknown, is missing here, or cannot serve this dtype or head_dim.
    """
    device = torch.device(device)
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"attention={requested!r}: must be one of auto, {', '.join(BACKENDS)}")

    def reason(name: str) -> str:
        return why_missing(name, device) or why_unsuited(name, device, dtype, head_dim)

    if requested != "auto":
        if why := reason(requested):
            usable = ", ".join(name for name in BACKENDS if not reason(name))
            raise ValueError(f"attention={requested!r}: {why}; available on {device}: {usable}")
        return AttentionChoice(requested, "requested", "" if why_not_ragged(requested, device) else requested)
    order = AUTO_ORDER.get(min(capability(device), 10), ("sdpa",))
    passed = []
    for name in order:
        if not (why := reason(name) or why_not_auto(name)):
            skipped = f" ({'; '.join(passed)})" if passed else ""
            in_half = device.type == "cuda" and dtype != torch.float32  # in fp32 no library runs, and our kernel spills
            ragged = RAGGED_ORDER if in_half else (name,)
            one_call = (other for other in ragged if not (reason(other) or why_not_ragged(other, device)))
            why = f"first of {', '.join(order)} that runs here{skipped}"
            return AttentionChoice(name, why, next(one_call, ""))
        passed.append(f"{name}: {why}")
    raise AssertionError(f"sdpa runs everywhere, so {order} must hold it")


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among all S tokens by one backend: [B, S, H, Dh] to [B, S, H, Dh]."""
    if name in LIBRARIES:
        out = load_library(name)[0](q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some flash versions return the log-sum-exp too
    if name == "cpu_bf16":
        return attention_bf16.attention_bf16(q, k, v)
    with sdpa_kernel(SDPA_BACKENDS[name]) if name in SDPA_BACKENDS else nullcontext():
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@lru_cache(maxsize=4096)
def lengths_tensor(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """`lengths` as int32 on the device, made once. A captured CUDA graph must keep the tensor that it reads."""
    made = torch.tensor(lengths, dtype=torch.int32)
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait for the device


def attend_ragged_flash3(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One call over samples that start S tokens apart and use `lengths` of them.

    Padding must be finite, and its rows come out undefined.
    """
    B, S = q.shape[:2]
    varlen = importlib.import_module(load_library("flash3")[0].__module__).flash_attn_varlen_func
    starts = lengths_tensor(tuple(S * b for b in range(B + 1)), q.device)
    used = lengths_tensor(lengths, q.device)
    flat = (t.reshape(B * S, *t.shape[2:]) for t in (q, k, v))
    out = varlen(*flat, starts, starts, S, S, seqused_q=used, seqused_k=used)
    return (out[0] if isinstance(out, tuple) else out).view(q.shape)


def attend_ragged_flash2(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """As `attend_segments`, by flash-attn 2."""
    return attend_segments(importlib.import_module("flash_attn").flash_attn_varlen_func, q, k, v, lengths)


def attend_ragged_torch(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """As `attend_segments`, by the flash kernel inside torch."""
    return attend_segments(importlib.import_module("torch.nn.attention.varlen").varlen_attn, q, k, v, lengths)


def attend_segments(varlen: Callable, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One call in which the tokens of a sample and its padding are sequences of their own: nothing is copied together.

    The padding's rows come out as what its tokens make of each other.
    """
    B, S = q.shape[:2]
    starts = sorted({S * b for b in range(B + 1)} | {S * b + n for b, n in enumerate(lengths)})
    longest = max(b - a for a, b in pairwise(starts))
    at = lengths_tensor(tuple(starts), q.device)
    out = varlen(*(t.reshape(B * S, *t.shape[2:]) for t in (q, k, v)), at, at, longest, longest)
    return (out[0] if isinstance(out, tuple) else out).view(q.shape)


@lru_cache(maxsize=256)
def padded_keys_mask(lengths: tuple[int, ...], S: int, device: torch.device):
    """xformers' mask for samples that start S tokens apart, made once: it is sent to the device from the host."""
    mask = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalPaddedKeysMask
    return mask.from_seqlens(q_seqlen=[S] * len(lengths), kv_padding=S, kv_seqlen=list(lengths), device=device)


def attend_ragged_xformers(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One call in which every token asks and only valid tokens answer.

    Padding must be finite, and its rows come out undefined.
    """
    B, S = q.shape[:2]
    bias = padded_keys_mask(lengths, S, q.device)
    flat = (t.reshape(1, B * S, *t.shape[2:]) for t in (q, k, v))
    return load_library("xformers")[0](*flat, attn_bias=bias).view(q.shape)


RAGGED = {
    "flash3": attend_ragged_flash3,
    "flash2": attend_ragged_flash2,
    "flash_sdpa": attend_ragged_torch,
    "xformers": attend_ragged_xformers,
    "cpu_bf16": attention_bf16.attention_bf16,
}
