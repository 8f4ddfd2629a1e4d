"""Puts the DiT's large linears into fewer bits: FP8 for speed and memory, NF4 for memory alone."""

import copy
import importlib.util
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from uniworld.checkpoint.progress import byte_progress
from uniworld.kernels.fp8_linear import MULTIPLE
from uniworld.models.flux import FluxTransformer
from uniworld.models.quantized import NF4_BLOCK, Fp8Linear, Nf4Linear

KINDS = {"fp8": Fp8Linear, "nf4": Nf4Linear}
FP8_CAPABILITY = (8, 9)


def check_quantize(kind: str | None, device: torch.device, dtype: torch.dtype, exclude: Sequence[str] = ()) -> None:
    """Raise a ValueError, before anything is loaded, where this device or dtype cannot run `kind`."""
    if kind is None:
        if exclude:
            raise ValueError(f"quantize_exclude={list(exclude)}: only has an effect with quantize")
        return
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}: must be one of {', '.join(KINDS)}, or None")
    if dtype not in (torch.bfloat16, torch.float32) or (device.type == "cuda" and dtype != torch.bfloat16):
        allowed = "bfloat16" if device.type == "cuda" else "bfloat16 or float32"
        raise ValueError(f"dtype={str(dtype).removeprefix('torch.')}: must be {allowed} with quantize={kind!r}")
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantize='nf4': bitsandbytes is missing; pip install 'uniworld[quant]'")
    if kind == "fp8" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < FP8_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"quantize='fp8': {name} is sm_{major}{minor}; e4m3 needs sm_89 or newer, nf4 does not")


def quantizable(model: FluxTransformer) -> dict[str, nn.Linear]:
    """The linears of the blocks by name, apart from those that make the modulation.

    Embedders, modulation and the output head are left alone: they run once a request or on few tokens, and every
    block feels their errors.
    """
    found = {}
    for name, module in model.named_modules():
        in_block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        if isinstance(module, nn.Linear) and in_block and ".norm" not in name:
            found[name] = module
    return found


def quantized_copy(
    model: FluxTransformer,
    kind: str,
    *,
    exclude: Sequence[str] = (),
    compute: torch.device | None = None,
    home: torch.device | None = None,
    progress: bool = False,
) -> FluxTransformer:
    """A DiT that shares every parameter of `model` but those of the quantized linears.

    In FP8 the two linears that read a single block's input become one.

    Args:
        kind: "fp8" or "nf4".
        exclude: globs over parameter names (`transformer_blocks.0.*`, `*.attn.to_qkv.weight`) that stay as they are.
        compute: where a weight is quantized; home: where the result stays. By default where the weight is.

    Raises:
        ValueError: a glob matches no parameter that would be quantized.
    """
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()})
    chosen = quantizable(made)
    for pattern in exclude:
        matched = [name for name in chosen if fnmatchcase(f"{name}.weight", pattern)]
        if not matched:
            raise ValueError(f"quantize_exclude={pattern!r}: matches no weight that would be quantized")
        for name in matched:
            del chosen[name]
    num_bytes = sum(linear.weight.nbytes for linear in chosen.values())
    with byte_progress(f"Quantizing the DiT to {kind}", num_bytes, progress) as advance:
        for name, linear in chosen.items():
            if fits(linear, kind):
                owner, _, attribute = name.rpartition(".")
                setattr(made.get_submodule(owner), attribute, quantized_linear(linear, kind, compute, home))
            advance(linear.weight.nbytes)
    for block in made.single_transformer_blocks:
        block.join()
    return made


def fits(linear: nn.Linear, kind: str) -> bool:
    """Whether the sides of a linear suit `kind`; those of FLUX do."""
    if kind == "fp8":
        return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
    return linear.in_features % NF4_BLOCK == 0  # bitsandbytes' CPU code misreads scales that span two rows


def quantized_linear(
    linear: nn.Linear, kind: str, compute: torch.device | None, home: torch.device | None
) -> nn.Module:
    """One linear in fewer bits. Of a linear on meta only the shapes are made."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    made = KINDS[kind](linear.in_features, linear.out_features, bias.dtype, home or weight.device)
    if not weight.is_meta:
        made.fill(weight.to(compute or weight.device), bias)
    return made
