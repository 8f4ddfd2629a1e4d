"""Optimizers, and the learning rate as a plain function of the step.

Sources: AdamW (Loshchilov and Hutter, 2019); Prodigy (Mishchenko and Defazio, 2024); Muon (Jordan et al., 2024,
kellerjordan.github.io/posts/muon).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from uniworld.checkpoint.precision import emulates_bf16
from uniworld.config import OptimConfig, TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 1: a linear warm-up, then the schedule over what is left."""
    optim = config.optim
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - 1 - optim.warmup_steps) / max(config.num_steps - optim.warmup_steps, 1)
    return optim.lr * (1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """The optimizer over one group of parameters; for "muon" see `Muon`.

    Raises: ValueError naming what to install for "prodigy" and "adamw8bit".
    """
    return OPTIMIZERS[config.name](config, parameters)


class Unrounded(TorchFunctionMode):
    """Inside of it what asks for bf16 gets fp32: torch's Muon does for its products, which take several times as long
    as all else of a step on a CPU that emulates them."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class Muon:
    """torch's Muon for matrices, AdamW for all else: gains, biases, embeddings and what they are tied to, convolutions.

    Args:
        matrices, others: what each of the two updates. The first group is that of the matrices, whose learning rate is
            `config.muon_lr` where that of the others is `config.lr`.
    """

    def __init__(self, config: OptimConfig, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter]):
        decay = config.weight_decay * config.lr / config.muon_lr  # a step takes as much off as one of AdamW
        self.parts = {
            "muon": torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=decay),
            "adamw": torch.optim.AdamW(others, fused=True, **_common(config)),
        }
        self.unrounded = emulates_bf16(matrices[0].device)

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        with Unrounded() if self.unrounded else nullcontext():
            for part in self.parts.values():
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


def matrix_names(module: nn.Module) -> set[str]:
    """The parameters that Muon is for: weights of linear layers, but those over the vocabulary."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)} - embeddings
    heads = {id(m.lm_head.weight) for m in module.modules() if hasattr(m, "lm_head")}
    return {name for name, parameter in module.named_parameters() if id(parameter) in linear - heads}


def set_learning_rate(optimizer: Optimizer | Muon, lr: float, config: OptimConfig) -> None:
    """Give all groups the learning rate of a step; the matrices of Muon their own, which follows the same schedule."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, Muon):
        optimizer.param_groups[0]["lr"] = lr * config.muon_lr / config.lr


def _adamw(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **_common(config))


def _adamw8bit(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise _missing(error, "adamw8bit", "bitsandbytes") from None
    return AdamW8bit(parameters, **_common(config))


def _prodigy(config: OptimConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    return sharded_prodigy()(parameters, use_bias_correction=True, safeguard_warmup=True, **_common(config))


def _common(config: OptimConfig) -> dict:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}


def _missing(error: ModuleNotFoundError, name: str, package: str) -> ValueError:
    return ValueError(f"optim.name={name}: {error.name} is missing; pip install {package}")


OPTIMIZERS: dict[str, Callable[[OptimConfig, Sequence[nn.Parameter]], Optimizer]] = {
    "adamw": _adamw,
    "prodigy": _prodigy,
    "adamw8bit": _adamw8bit,
}


def sharded_prodigy() -> type[Optimizer]:
    """prodigyopt's Prodigy, whose step size is estimated over the slices of all ranks.

    Under ZeRO each rank sees its own slice alone. prodigyopt would let each rank find a step size of its own, and its
    reduction for sharded parameters works on CUDA only. The formulas and the state are prodigyopt's; the estimate
    costs one reduction of two numbers and one synchronisation a step.
    """
    try:
        from prodigyopt import Prodigy
    except ModuleNotFoundError as error:
        raise _missing(error, "prodigy", "prodigyopt") from None

    class ShardedProdigy(Prodigy):
        @torch.no_grad()
        def step(self, closure=None):
            group = self.param_groups[0]
            beta1, beta2 = group["betas"]
            beta3 = math.sqrt(beta2)
            k, d, d0 = group["k"], group["d"], group["d0"]
            correction = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1))
            dlr = d * group["lr"] * correction
            parameters = [p for p in group["params"] if p.grad is not None]

            sums = torch.zeros(2, dtype=torch.float32, device=parameters[0].device)
            for p in parameters:
                state = self._state(p)
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=d * (1 - beta1))
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=d * d * (1 - beta2))
                state["s"].mul_(beta3).add_(p.grad, alpha=(d / d0) * d)
                sums[0] += (d / d0) * dlr * torch.dot(p.grad.flatten(), (state["p0"] - p).flatten())
                sums[1] += state["s"].abs().sum()
            numerator, denominator = _summed(sums)
            self._estimate(group, numerator, denominator, beta3)

            for p in parameters:
                state = self.state[p]
                state["step"] += 1
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["weight_decay"] * dlr)
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["d"] * group["eps"]), value=-dlr)
            group["k"] = k + 1

        def _state(self, p: Tensor) -> dict:
            state = self.state[p]
            if not state:
                state |= {"step": 0, "p0": p.detach().clone()}
                state |= {name: torch.zeros_like(p) for name in ("s", "exp_avg", "exp_avg_sq")}
            return state

        def _estimate(self, group: dict, numerator: float, denominator: float, beta3: float) -> None:
            if denominator == 0:
                return
            group["d_numerator"] = group["d_numerator"] * beta3 + numerator
            d_hat = group["d_coef"] * group["d_numerator"] / denominator
            if group["d"] == group["d0"]:
                group["d"] = max(group["d"], d_hat)
            group["d_max"] = max(group["d_max"], d_hat)
            group["d"] = min(group["d_max"], group["d"] * group["growth_rate"])

    return ShardedProdigy


def _summed(sums: Tensor) -> list[float]:
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()
