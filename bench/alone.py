"""What each optimization of a DiT step gives alone: ours with one of them taken away at a time, against ours with all.

Taken away are: a fused op, for its plain torch reference; what is made once a request (modulation, text projection,
rotary tables), which is then made in every step; q, k and v in one product; the single blocks' two products of their
input, which are then one; the CUDA graph; the attention kernel, for each other one that this device has. On a GPU these
are steps of FLUX.1-dev, replayed as CUDA graphs but where the graph is what is taken away; on a CPU of a small DiT. In
FP8, whose products a CPU does not have, the single blocks' one product of their input is taken away.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from full_cases import Case, step_inputs
from full_steps import replayed
from peers import random_flux, relative_error
from residents import without_frames
from timing import Call, Samples, interleave
from torch import Tensor

from uniworld.engine import steps
from uniworld.engine.quantize import quantized_copy
from uniworld.kernels.attention_backends import available_backends, choose_backend, why_unsuited
from uniworld.kernels.linear import linear
from uniworld.kernels.registry import load_ops
from uniworld.models.blocks import AttentionPlan, Linear, SingleBlock
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.models.quantized import linear_of_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY_RUN = os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny"
BENCH = "alone_dry_run" if DRY_RUN else "alone"
DTYPE = torch.bfloat16
ALL, NO_GRAPH, NO_OPS = "all of them", "the CUDA graph", "all fused ops"
SMALL = FluxConfig(num_layers=1, num_single_layers=2, num_attention_heads=8, joint_attention_dim=1024)
TOY = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    axes_dims_rope=(8, 12, 12),
    num_attention_heads=2,
    joint_attention_dim=64,
    pooled_projection_dim=32,
)
CONFIG = TOY if DRY_RUN else FluxConfig() if DEVICE == "cuda" else SMALL
FULL_CASES, SMALL_CASES, TOY_CASES = (Case(1, 1024), Case(0, 512)), (Case(0, 256, shrink=4),), (Case(0, 64, shrink=16),)
CASES = TOY_CASES if DRY_RUN else FULL_CASES if DEVICE == "cuda" else SMALL_CASES
OPS = load_ops()
# The fused ops of a step and what stands for each; `linear` differs from torch's on a CPU in bf16 alone.
FUSED = {
    "adaln_modulate": ("adaln_modulate",),
    "gate_residual": ("gate_residual", "gate_residual_adaln"),
    "qk_norm_rope": ("qk_norm_rope",),
    "gelu_linear": ("gelu_linear",),
    "flow_step": ("flow_step",),
    "linear": ("linear",),
}
NUM_STEPS = 28


class Request:
    """A request in its ninth step; what may be made in every step is a method."""

    def __init__(self, model: FluxTransformer, case: Case, device: str, dtype: torch.dtype):
        self.model, self.inputs = model, step_inputs(case, model.config, dtype, device)
        self.latents, self.dsigma = self.inputs["img"].float(), torch.tensor([-0.03], device=device)
        timesteps = torch.linspace(1.0, 0.1, NUM_STEPS, device=device)[:, None]
        self.table = model.modulation(timesteps, self.inputs["guidance"], self.inputs["pooled"])
        self.timestep = timesteps[9:10]
        self.made = {"modulation": self.table[9], "text projection": self.txt(), "rotary tables": self.pe()}

    def modulation(self) -> Tensor:
        return self.model.modulation(self.timestep, self.inputs["guidance"], self.inputs["pooled"])[0]

    def txt(self) -> Tensor:
        return self.model.embed_txt(self.inputs["txt"])

    def pe(self):
        return self.model.rope(self.inputs["img_ids"])

    def step(self, anew: str = "") -> Tensor:
        """The latents after a step of the engine's loop, with one of the prepared things made anew."""
        makers = {"modulation": self.modulation, "text projection": self.txt, "rotary tables": self.pe}
        made = self.made | ({anew: makers[anew]()} if anew else {})
        img = self.latents.to(self.inputs["img"].dtype)
        velocity = self.model.denoise(img, made["text projection"], made["modulation"], made["rotary tables"])
        return steps.flow_step(self.latents, velocity, self.dsigma)


@dataclass(frozen=True)
class Variant:
    """One optimization taken away: a context to be in during a step, and what a step makes anew."""

    inside: Callable = nullcontext
    anew: str = ""
    graph: bool = True


def variants(model: FluxTransformer, device: str, dtype: torch.dtype) -> dict[str, Variant]:
    found = {ALL: Variant()}
    for name, ops in FUSED.items():
        found[name] = Variant(functools.partial(references, ops))
    found[NO_OPS] = Variant(functools.partial(references, tuple(op for ops in FUSED.values() for op in ops)))
    for name in ("modulation", "text projection", "rotary tables"):
        found[f"{name} once a request"] = Variant(anew=name)
    found["q, k and v in one product"] = Variant(three_products)
    found["single blocks' two products of their input"] = Variant(functools.partial(one_product, {}))
    head_dim = model.config.attention_head_dim
    chosen = choose_backend("auto", torch.device(device), dtype, head_dim).name
    for name, missing in available_backends(device).items():
        if not (missing or why_unsuited(name, torch.device(device), dtype, head_dim)) and name != chosen:
            found[f"attention by {chosen}, {name} instead"] = Variant(functools.partial(attention, model, name))
    if device == "cuda":
        found[NO_GRAPH] = Variant(graph=False)
    return found


@contextmanager
def references(names: tuple[str, ...]) -> Iterator[None]:
    """Ops are their references wherever a module of ours has imported them."""
    with ExitStack() as stack:
        for name in names:
            fn, reference = (linear, F.linear) if name == "linear" else (OPS[name].fn, OPS[name].reference)
            for module in [m for key, m in sys.modules.items() if key.startswith("uniworld.")]:
                if vars(module).get(name) is fn:
                    stack.enter_context(mock.patch.object(module, name, reference))
        yield


@contextmanager
def three_products() -> Iterator[None]:
    """The projections to q, k and v as three products, each written to its third of the result."""

    def forward(self: Linear, x: Tensor) -> Tensor:
        out_features, in_features = self.weight.shape
        if out_features != 3 * in_features:  # no projection to q, k and v
            return linear(x, self.weight, self.bias)
        flat = x.reshape(-1, in_features)
        y = x.new_empty(flat.shape[0], out_features)
        for part, weight, bias in zip(y.chunk(3, dim=1), self.weight.chunk(3), self.bias.chunk(3)):
            torch.addmm(bias, flat, weight.t(), out=part)
        return y.view(*x.shape[:-1], out_features)

    with mock.patch.object(Linear, "forward", forward):
        yield


@contextmanager
def one_product(fused: dict[SingleBlock, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """One product of 7 D columns in a single block, whose last 4 D then go through GELU: no GELU in an epilogue.
    `fused` keeps each block's joined weight and bias."""

    def forward(block: SingleBlock, normed: Tensor, plan: AttentionPlan) -> Tensor:
        first, second = block.attn.to_qkv, block.proj_mlp
        if block not in fused:
            fused[block] = torch.cat([first.weight, second.weight]), torch.cat([first.bias, second.bias])
        qkv, hidden = linear(normed, *fused[block]).split([first.out_features, second.out_features], dim=-1)
        attended = block.attn(qkv, plan)
        hidden = F.gelu(hidden, approximate="tanh")
        return linear_of_pair(attended, hidden, block.proj_out.weight, block.proj_out.bias)

    with mock.patch.object(SingleBlock, "forward", forward):
        yield


@contextmanager
def attention(model: FluxTransformer, backend: str) -> Iterator[None]:
    with mock.patch.object(model, "attention_backend", backend):
        yield


def two_products() -> AbstractContextManager:
    """One product for q, k and v of a single block and one for its MLP, of weights that lie together."""
    return mock.patch.object(SingleBlock, "forward", SingleBlock.forward_apart)


def call_of(request: Request, variant: Variant, device: str) -> Call:
    def step() -> Tensor:
        with torch.inference_mode(), variant.inside():
            return request.step(variant.anew)

    return replayed(step) if device == "cuda" and variant.graph else step


@functools.cache
def model(quantize: str | None = None) -> FluxTransformer:
    return random_flux(CONFIG, DTYPE, DEVICE) if quantize is None else quantized_copy(model(), quantize)


@functools.cache
def measure(case: Case, quantize: str | None) -> dict[str, tuple[Samples, float] | Exception]:
    """(samples, distance of the latents from those with everything) of each variant, or the exception it raised."""
    with torch.inference_mode():
        request = Request(model(quantize), case, DEVICE, DTYPE)
    found, calls, truth = {}, {}, None
    for name, variant in (variants(model(), DEVICE, DTYPE) if quantize is None else FP8_VARIANTS).items():
        try:
            calls[name] = call_of(request, variant, DEVICE)
            latents = calls[name]()
            truth = latents.clone() if truth is None else truth
            found[name] = relative_error(latents, truth)
        except Exception as error:  # one that fails must not hide the others
            calls.pop(name, None)
            found[name] = without_frames(error)
    timed = interleave({name: [call] for name, call in calls.items()}, sample_s=0.0, device=DEVICE, warmup=0)
    return found | {name: (samples, found[name]) for name, samples in timed.items()}


FP8_VARIANTS = {ALL: Variant(), "single blocks' one product of their input": Variant(two_products)}


def names() -> list[tuple[str | None, str]]:
    """What is taken away from a dense DiT, and from one in FP8 where a product in it is no stand-in."""
    with torch.device("meta"):
        dense = variants(FluxTransformer(CONFIG), DEVICE, DTYPE)
    return [(None, name) for name in dense] + [("fp8", name) for name in FP8_VARIANTS if DEVICE == "cuda" or DRY_RUN]


@pytest.mark.parametrize(
    "case, quantize, without", [pytest.param(c, *n, id=f"{c}-{n[0]}-{n[1]}") for c in CASES for n in names()]
)
def test_without(case, quantize, without, report):
    measured = measure(case, quantize)
    if isinstance(measured[without], Exception):
        raise measured[without]
    samples, error = measured[without]
    more = {"times_longer": samples.median / measured[ALL][0].median, "parameters": num_parameters()}
    more |= {"error": error, "error_is": "relative to the step with all of them", "tokens": case.num_tokens}
    in_fp8 = f", {quantize}" if quantize else ""
    report(BENCH, f"{case}, S = {case.num_tokens}{in_fp8}", without, DTYPE, samples, **more)


def num_parameters() -> int:
    return sum(p.numel() for p in model().parameters())
