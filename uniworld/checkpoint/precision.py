"""Which device and dtype a model takes when none is asked for."""

from pathlib import Path

import torch

FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 with native bf16 dot products, and Arm
LOADABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device, *, tiny: bool = False) -> torch.dtype:
    """bf16 on a GPU and on CPUs that compute in it, else fp32.

    `tiny` is fp32 on every CPU: it is so small that speed does not matter, and its results then agree across CPUs.
    """
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if not tiny and cpu_has_fast_bf16() else torch.float32


def cpu_has_fast_bf16() -> bool:
    """Whether /proc/cpuinfo lists native bf16 (False where there is no such file)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not FAST_BF16_FLAGS.isdisjoint(flags.split())


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 products are made of fp32 ones: on CPUs with AVX2 alone they take over a hundred times as long."""
    return device.type == "cpu" and not cpu_has_fast_bf16()


def vae_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The VAE takes the model's dtype on a GPU; on a CPU fp32, or fp64 where the model has that."""
    if device.type == "cuda" or dtype == torch.float64:
        return dtype
    return torch.float32


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype itself, or by its name ("bfloat16"); ValueError for one that no model can be loaded in."""
    names = {str(known).removeprefix("torch."): known for known in LOADABLE}
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise ValueError(f"dtype={name}: must be one of {', '.join(names)}")
    return names[name]
