"""LoRA on the DiT's attention projections: low-rank factors learn instead of the weights.

Hu et al. (2021), with peft's layers: y = W x + B A x, where A [r, in] starts random and B [out, r] at zero. Fused
projections have one A for q, k and v, whose B's are row blocks; as separate adapters of diffusers' `to_q`, `to_k` and
`to_v` they are the same numbers. Only linears that the DiT calls as modules can carry factors: those whose weights go
into a fused op (the first linear of each MLP, and a single block's output) are left alone.

Letters: r rank.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from uniworld.checkpoint.names import authors_names, diffusers_names

TARGETS = r".*\.attn\.(to_qkv|add_qkv_proj|to_out\.0|to_add_out)"
ADAPTER = "default"
_FACTOR = re.compile(rf"^(?:denoiser\.)?(.+)\.lora_(A|B)\.{ADAPTER}\.weight$")


class Weights(Protocol):
    """Named tensors that are read when asked for; `TrainedWeights` is one, and so is a dict of tensors."""

    def __getitem__(self, name: str) -> Tensor: ...


def add_lora(denoiser: nn.Module, rank: int) -> list[str]:
    """Give every target factors of this rank, with a scale of 1; returns the names of the linears.

    Raises: ValueError where peft is missing or the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"model.lora_rank={rank}: must be at least 1")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError(f"model.lora_rank={rank}: {error.name} is missing; pip install 'uniworld[train]'") from None
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=TARGETS)
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    return [name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")]


def merge_lora(denoiser: nn.Module) -> None:
    """Add the factors' products to the weights and put the plain linears back, in place."""
    for name, module in list(denoiser.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        linear, scale = module.base_layer, module.scaling[ADAPTER]
        update = delta(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight) * scale
        with torch.no_grad():
            linear.weight.copy_(linear.weight.float() + update)
        owner, _, attribute = name.rpartition(".")
        setattr(denoiser.get_submodule(owner), attribute, linear)


def delta(a: Tensor, b: Tensor) -> Tensor:
    """B A in fp32, [out, in]."""
    return b.float() @ a.float()


def is_factor(name: str) -> bool:
    """Whether a parameter of `TrainModel` is a LoRA factor."""
    return _FACTOR.match(name) is not None


def adapted_linears(names: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """(linear in the DiT, name of its A, name of its B) of the factors among parameter names."""
    factors: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _FACTOR.match(name):
            factors.setdefault(match[1], {})[match[2]] = name
    for linear, found in factors.items():
        yield linear, found["A"], found["B"]


def authors_deltas(shapes: Mapping[str, object], weights: Weights) -> dict[str, "Delta"]:
    """What to add to the tensors of a checkpoint in the authors' layout, by key."""
    found = {}
    for linear, a, b in adapted_linears(shapes):
        keys = authors_names("denoiser", f"{linear}.weight")
        found |= {key: Delta(weights, a, b, row, len(keys)) for row, key in enumerate(keys)}
    return found


class Delta:
    """Row block `row` of `rows` of a product B A; called, it reads the factors and multiplies."""

    def __init__(self, weights: Weights, a: str, b: str, row: int, rows: int):
        self.weights, self.a, self.b, self.row, self.rows = weights, a, b, row, rows

    def __call__(self) -> Tensor:
        return delta(self.weights[self.a], self.weights[self.b].chunk(self.rows)[self.row])


def diffusers_adapter(shapes: Mapping[str, object], weights: Weights) -> dict[str, Tensor]:
    """The factors under the names that diffusers' `load_lora_adapter` and `load_lora_weights` read."""
    tensors = {}
    for linear, a, b in adapted_linears(shapes):
        keys = diffusers_names(f"{linear}.weight")
        blocks = weights[b].chunk(len(keys))
        for key, block in zip(keys, blocks):
            prefix = f"transformer.{key.removesuffix('.weight')}"
            tensors |= {f"{prefix}.lora_A.weight": weights[a].clone(), f"{prefix}.lora_B.weight": block.clone()}
    return tensors
