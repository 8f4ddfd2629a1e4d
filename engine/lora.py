"""LoRA on the DiT: factors beside its linears, or fused into their weights and taken out again to the bit.

Hu et al. (2021): y = W x + scale * B A x. Beside a linear stands one pair of factors whatever the number of LoRAs: the
A's stacked, the B's side by side with the scales inside, each on the rows it was trained for (q, k and v are rows of
one linear here). Fused, W becomes W + sum of scale * B A, summed in fp32 from the base's rows and rounded once; those
rows are kept in host memory, and unfusing copies them back.

Letters: r rank of a factor, R sum of the ranks of all that stands beside a linear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniworld.checkpoint.lora_files import Factor, read_lora
from uniworld.checkpoint.weights import listed
from uniworld.models.flux import FluxTransformer

NO_ERRORS = "with report_error steps are held against a DiT without LoRA, leave one out"


class AdaptedLinear(nn.Module):
    """A linear and what stands beside it: linear(x) + b @ (a @ x). The linear may be quantized."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor):
        """a: [R, in]; b: [out, R], scales inside; both in the dtype of the activations."""
        super().__init__()
        self.linear = linear
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y, inner = self.linear(x), F.linear(x, self.a)
        return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.b.t()).view_as(y)


@dataclass(kw_only=True, eq=False)
class Lora:
    """One loaded LoRA."""

    source: str
    factors: list[Factor]
    scale: float
    fused: bool = False

    @property
    def linears(self) -> set[str]:
        return {factor.rows.linear for factor in self.factors}


class Loras:
    """All LoRAs of one DiT. Whatever changes, the linears concerned are made anew from the base and all factors."""

    def __init__(
        self,
        denoiser: FluxTransformer,
        device: torch.device,
        dtype: torch.dtype,
        streamed: Collection[nn.Module] = (),
    ):
        """
        Args:
            device, dtype: of the activations; factors that stand beside a linear are put there.
            streamed: modules whose weights come from host memory in each pass; what is added to them would be lost.
        """
        self.denoiser, self.device, self.dtype, self.streamed = denoiser, device, dtype, streamed
        self.loaded: dict[str, Lora] = {}
        self._linears: dict[str, nn.Module] = {}
        self._base_rows: dict[str, tuple[slice, Tensor]] = {}  # of weights that hold products now

    def load(self, source: str | Path, name: str | None, scale: float) -> str:
        self._linears = self._linears or {
            path: module for path, module in self.denoiser.named_modules() if hasattr(module, "in_features")
        }
        name = Path(source).name.removesuffix(".safetensors") if name is None else name
        if name in self.loaded:
            raise ValueError(f"name={name!r}: a LoRA of this name is loaded; unload it, or give another name")
        check_scale(scale)
        shapes = {path: (module.out_features, module.in_features) for path, module in self._linears.items()}
        lora = Lora(source=str(source), factors=read_lora(source, shapes), scale=float(scale))
        self.loaded[name] = lora
        self._renew(lora.linears)
        return name

    def set_scale(self, name: str, scale: float) -> None:
        check_scale(scale)
        (lora,) = self._named([name])
        lora.scale = float(scale)
        self._renew(lora.linears)

    def fuse(self, names: Sequence[str]) -> None:
        chosen = self._named(names)
        linears = set().union(*(lora.linears for lora in chosen))
        if quantized := sorted(path for path in linears if not is_plain(self._linears[path])):
            raise ValueError(f"fuse_lora: quantized weights take no products, leave it unfused: {listed(quantized)}")
        if streamed := sorted(path for path in linears if self._linears[path] in self.streamed):
            raise ValueError(f"fuse_lora: offloaded weights take no products, leave it unfused: {listed(streamed)}")
        for lora in chosen:
            lora.fused = True
        self._renew(linears)

    def unfuse(self, names: Sequence[str]) -> None:
        chosen = self._named(names)
        for lora in chosen:
            lora.fused = False
        self._renew(set().union(*(lora.linears for lora in chosen)))

    def unload(self, names: Sequence[str]) -> None:
        chosen = self._named(names)
        self.loaded = {name: lora for name, lora in self.loaded.items() if lora not in chosen}
        self._renew(set().union(*(lora.linears for lora in chosen)))

    def _named(self, names: Sequence[str]) -> list[Lora]:
        """The LoRAs of these names, all where none is given."""
        if missing := [name for name in names if name not in self.loaded]:
            loaded = ", ".join(self.loaded) or "none"
            raise ValueError(f"name={missing[0]!r}: no LoRA of this name is loaded (loaded: {loaded})")
        return [self.loaded[name] for name in names or self.loaded]

    @torch.no_grad()
    def _renew(self, linears: Iterable[str]) -> None:
        """Make the weights and modules of these linears what the loaded LoRAs ask for."""
        for path in sorted(linears):
            fused, beside = [], []
            for lora in self.loaded.values():
                here = (factor for factor in lora.factors if factor.rows.linear == path)
                (fused if lora.fused else beside).extend((factor, factor.scaling * lora.scale) for factor in here)
            self._fuse_into(path, fused)
            self._put_beside(path, beside)

    def _fuse_into(self, path: str, factors: list[tuple[Factor, float]]) -> None:
        """Put the base's rows back, then add the products of `factors` to them."""
        if path in self._base_rows:
            rows, base = self._base_rows.pop(path)
            self._linears[path].weight[rows].copy_(base)
        if not factors:
            return
        weight = self._linears[path].weight
        rows = slice(min(f.rows.start for f, _ in factors), max(f.rows.stop for f, _ in factors))
        self._base_rows[path] = rows, weight[rows].to("cpu", copy=True)
        total = weight[rows].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for factor, scale in factors:
            a, b = (t.to(total.device, total.dtype) for t in (factor.a, factor.b))
            total[factor.rows.start - rows.start : factor.rows.stop - rows.start].addmm_(b, a, alpha=scale)
        weight[rows].copy_(total)

    def _put_beside(self, path: str, factors: list[tuple[Factor, float]]) -> None:
        """Stand `factors` beside the linear; in place where only their values change, so that graphs stay good."""
        module = linear = self._linears[path]
        if factors:
            exact = torch.promote_types(self.dtype, torch.float32)
            a, b = (t.to(self.device, self.dtype) for t in stacked(factors, linear.out_features, exact))
            now = self.denoiser.get_submodule(path)
            if isinstance(now, AdaptedLinear) and now.a.shape == a.shape:
                now.a.copy_(a)
                now.b.copy_(b)
                return
            module = AdaptedLinear(linear, a, b)
        self.denoiser.set_submodule(path, module)


def stacked(factors: list[tuple[Factor, float]], num_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One pair (a [R, in], b [num_out, R]) for several pairs on rows of their own; b holds the scales."""
    shared = {id(factor.a): factor.a for factor, _ in factors}  # pairs that a file's fused linear was split into
    first = dict(zip(shared, itertools.accumulate((a.shape[0] for a in shared.values()), initial=0)))
    a = torch.cat([a.to(dtype) for a in shared.values()])
    b = torch.zeros(num_out, a.shape[0], dtype=dtype)
    for factor, scale in factors:
        column, rows = first[id(factor.a)], factor.rows
        b[rows.start : rows.stop, column : column + factor.a.shape[0]] += factor.b.to(dtype) * scale
    return a, b


def is_plain(linear: nn.Module) -> bool:
    """Whether products can be added to the weight: it is in fp16, bf16, fp32 or fp64."""
    return linear.weight.is_floating_point() and linear.weight.itemsize > 1


def check_scale(scale: float) -> None:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number")


class LoraMethods:
    """What an engine offers: LoRAs of its DiT. Needs `model` and `denoiser`. Changes hold from the next request on."""

    model: Any
    denoiser: Any
    _streamed: Collection[nn.Module] = ()
    _loras: Loras | None = None

    @property
    def loras(self) -> Loras:
        if self._loras is None:
            self._loras = Loras(self.model.denoiser, self.model.device, self.model.dtype, self._streamed)
        return self._loras

    def _changing(self) -> Loras:
        """The LoRAs, to be changed: CUDA graphs were recorded with what the DiT was before."""
        self.denoiser.graphs.clear()
        return self.loras

    def load_lora(self, path_or_id: str | Path, *, name: str | None = None, scale: float = 1.0) -> str:
        """Put a LoRA beside the DiT's linears; several add up. Returns its name.

        Args:
            path_or_id: a .safetensors file, a folder with one (as `uniworld export` and peft write them), or a Hub id.
            name: to speak of it later; default: the file's name without its suffix.
            scale: what its products are multiplied by, beside the alpha / rank of the file.

        Raises:
            ValueError: the name is taken, the file does not fit this DiT (keys and shapes are listed), or errors of a
                quantized DiT are reported.
            FileNotFoundError: no such file or repository.
        """
        if self.denoiser.errors is not None and self.denoiser.errors.every_step:
            raise ValueError(f"load_lora: {NO_ERRORS}")
        return self._changing().load(path_or_id, name, scale)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change the scale of a loaded LoRA, fused or not; 0 turns it off. Raises: ValueError for an unknown name."""
        self._changing().set_scale(name, scale)

    def fuse_lora(self, *names: str) -> None:
        """Add these LoRAs (default: all) to the weights: no work at each step, one rounding to the weights' dtype.

        The base's rows are kept in host memory. Raises: ValueError for an unknown name, or where weights are quantized
        or offloaded.
        """
        self._changing().fuse(names)

    def unfuse_lora(self, *names: str) -> None:
        """Take these LoRAs (default: all) out of the weights, which get the base's bits back, and put them beside."""
        self._changing().unfuse(names)

    def unload_lora(self, *names: str) -> None:
        """Forget these LoRAs (default: all); the weights are those of the base again. Raises: ValueError."""
        self._changing().unload(names)
