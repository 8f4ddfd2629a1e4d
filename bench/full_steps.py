"""One DiT step at full size: ours in every way it runs, and diffusers', on one set of random weights."""

import functools
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from deadline import COMPILE_S, Deadline, Missing
from full_cases import Case, Scale, step_inputs
from full_model import denoiser_config
from peers import (
    MISSING,
    attention_kernels,
    diffusers_flux,
    our_attention,
    random_flux,
    relative_error,
    run_diffusers,
    same_attention,
)
from residents import free, measure_once, own_bytes, without_frames
from timing import Call, Samples, capture, interleave
from torch import Tensor, nn

from uniworld.engine.compiled import compile_blocks
from uniworld.engine.quantize import FP8_CAPABILITY, quantizable, quantized_copy
from uniworld.models.flux import FluxTransformer

OURS, COMPILED, GRAPH = "ours", "ours compiled", "ours, CUDA graph"
FP8, FP8_GRAPH = "ours, fp8", "ours, fp8, CUDA graph"
ONE_BY_ONE = "ours, one after the other"  # of a batch of unequal lengths
EAGER, PEER_COMPILED, TORCHAO = "diffusers eager", "diffusers compiled", "diffusers compiled, torchao fp8"
PEERS = (EAGER, PEER_COMPILED, TORCHAO)
COMPILING = (COMPILED, PEER_COMPILED, TORCHAO)
MODELS = {  # of each side, the attribute of `StepBench` that it runs on
    OURS: "ours",
    COMPILED: "compiled",
    FP8: "fp8",
    ONE_BY_ONE: "ours",
    EAGER: "eager",
    PEER_COMPILED: "peer_compiled",
    TORCHAO: "torchao",
}
GRAPHS = {GRAPH: OURS, FP8_GRAPH: FP8}
MAX_RECOMPILES = 64  # every shape is compiled anew for two models that share their code
LONG_S = 0.05  # a call that takes longer is one sample, and has been warmed up enough


def step_sides(case: Case, largest_px: int) -> tuple[str, ...]:
    """All sides at the largest size; each shape costs the compiled ones a compilation, so that they come last, and the
    rest have fewer."""
    if case.unequal:  # no graph holds the lengths, and diffusers attends to padding
        return (OURS, ONE_BY_ONE, FP8, EAGER)
    if case.batch > 1 or case.num_references > 1:
        return (OURS, GRAPH, FP8_GRAPH, EAGER, PEER_COMPILED)
    sides = (OURS, GRAPH, FP8, FP8_GRAPH, EAGER, PEER_COMPILED, COMPILED)
    return (*sides, TORCHAO) if case.size_px == largest_px else sides


@dataclass
class Measured:
    """Of one side.

    peak_gib: its own weights and what a call needs; attention: of a step what was seen to run, of a request the DiT's
    backend in ours, which the peers are given too; error: of a step, to what `error_is` says; more: what a request of
    ours says of itself.
    """

    samples: Samples
    peak_gib: float | None
    attention: str
    error: float | None = None
    error_is: str = "relative to diffusers in fp32"
    more: dict[str, Any] = field(default_factory=dict)


class StepBench:
    """The models of all sides, each made when a case first needs it."""

    def __init__(self, scale: Scale, device: str, dtype: torch.dtype, *, may_compile: bool = True, rounds: int = 9):
        self.scale, self.device, self.dtype, self.rounds = scale, device, dtype, rounds
        self.may_compile, self.deadline = may_compile, Deadline()
        self.truths = self._truths() if has_diffusers() else {}
        free()
        self.ours = random_flux(denoiser_config(scale.size), dtype, device)
        self.attention = our_attention(self.ours, device, dtype)
        torch._dynamo.config.recompile_limit = MAX_RECOMPILES

    def _truths(self) -> dict[Case, Tensor]:
        """diffusers' predictions in fp32 for single pictures, from the same bf16 values of the weights."""
        model = random_flux(denoiser_config(self.scale.size), torch.float32, self.device)
        peer = diffusers_flux(model, self.device)
        cases = [case for case in self.scale.step_cases if case.batch == 1]
        with torch.inference_mode():
            return {
                case: run_diffusers(peer, **step_inputs(case, model.config, torch.float32, self.device)).cpu()
                for case in cases
            }

    @functools.cached_property
    def compiled(self) -> FluxTransformer:
        """Ours a second time, on the same weights, with its blocks compiled as `Engine(compile=True)` does."""
        self._check_may_compile()
        with torch.device("meta"):
            twin = FluxTransformer(self.ours.config)
        twin.load_state_dict(self.ours.state_dict(), assign=True)
        twin.eval().requires_grad_(False)
        compile_blocks(twin)
        return twin

    @functools.cached_property
    def fp8(self) -> FluxTransformer:
        check_e4m3(self.device)
        return quantized_copy(self.ours, "fp8")

    @functools.cached_property
    def eager(self) -> nn.Module:
        return diffusers_peer(self.ours, self.device, self.attention)

    @functools.cached_property
    def peer_compiled(self) -> nn.Module:
        self._check_may_compile()
        return compiled_peer(diffusers_peer(self.ours, self.device, self.attention))

    @functools.cached_property
    def torchao(self) -> nn.Module:
        """diffusers' model with the linears that ours quantizes in e4m3 by torchao, row by row, compiled."""
        if importlib.util.find_spec("torchao") is None:
            raise Missing("torchao is not installed")
        check_e4m3(self.device)
        self._check_may_compile()
        if self.device != "cuda":
            raise Missing("torchao's fp8 needs a CUDA device")
        return compiled_peer(torchao_fp8(diffusers_peer(self.ours, self.device, self.attention), self.ours))

    def _check_may_compile(self) -> None:
        if not self.may_compile:
            raise Missing("nothing is compiled in this run")

    def measure(self, case: Case) -> dict[str, Measured | Exception]:
        """What every side of a case measures, or the exception that it raised."""
        inputs = step_inputs(case, self.ours.config, self.dtype, self.device)
        found, calls, predictions = {}, {}, {}
        for side in step_sides(case, max(self.scale.sides_px)):
            try:
                if side in COMPILING:
                    self.deadline.keep(2 * COMPILE_S)  # and as much for timing all sides, and to end
                call, model = self._call(side, inputs, case)
                prediction, peak = measure_once(call, own_bytes(model), self.device, once=side in GRAPHS)
                plain = calls.get(GRAPHS.get(side, side), call)
                found[side] = Measured(Samples(""), peak, attention_kernels(plain))
                calls[side], predictions[side] = call, prediction.clone()  # a graph's is written to again
            except Missing as error:
                found[side] = error.with_traceback(None)
            except Exception as error:  # one side that fails must not hide the others
                found[side] = without_frames(error)
        for side, samples in self._timed(calls).items():
            found[side].samples = samples
        self._compare(case, found, predictions)
        return found

    def _compare(self, case: Case, found: dict[str, Measured | Exception], predictions: dict[str, Tensor]) -> None:
        """Errors to the truth. Batches have none in fp32, which would take long: there to eager diffusers, or, where it
        attends to padding, to each sample alone."""
        reference = ONE_BY_ONE if case.unequal else EAGER
        for side, prediction in predictions.items():
            if case in self.truths:
                found[side].error = relative_error(prediction, self.truths[case])
            elif side not in (reference, EAGER) and reference in predictions:
                found[side].error = relative_error(prediction, predictions[reference])
                found[side].error_is = f"relative to {reference}"

    def _timed(self, calls: dict[str, Call]) -> dict[str, Samples]:
        once = interleave({s: [c] for s, c in calls.items()}, rounds=1, sample_s=0.0, device=self.device, warmup=0)
        long = max((samples.median for samples in once.values()), default=0.0) > LONG_S
        settings = {"sample_s": 0.0, "warmup": 0} if long else {"sample_s": 0.1 if self.rounds > 1 else 0.0}
        return interleave({s: [c] for s, c in calls.items()}, rounds=self.rounds, device=self.device, **settings)

    def _call(self, side: str, inputs: dict[str, Tensor], case: Case) -> tuple[Call, nn.Module]:
        """What takes a step, and the model that it belongs to."""
        if side in GRAPHS:
            if self.device != "cuda":
                raise Missing("needs a CUDA device")
            call, model = self._call(GRAPHS[side], inputs, case)
            return replayed(call), model
        model = getattr(self, MODELS[side])
        if side in PEERS:
            return functools.partial(self._peer_step, model, inputs), model
        if side == ONE_BY_ONE:
            return one_after_the_other(model, inputs, case.txt_lengths), model
        return prepared_step(model, inputs, case.txt_lengths if case.unequal else None), model

    def _peer_step(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode(), same_attention(self.device, self.attention):
            return run_diffusers(model, **inputs)


def prepared_step(
    model: FluxTransformer, inputs: dict[str, Tensor], txt_lengths: tuple[int, ...] | None = None
) -> Call:
    """One step as the engine's loop runs it, text and modulation prepared."""
    with torch.inference_mode():
        txt = model.embed_txt(inputs["txt"])
        row = model.modulation(inputs["timestep"][:1, None], inputs["guidance"], inputs["pooled"])[0]
        pe = model.rope(inputs["img_ids"])

    def step() -> Tensor:
        with torch.inference_mode():
            return model.denoise(inputs["img"], txt, row, pe, txt_lengths)

    return step


def one_after_the_other(model: FluxTransformer, inputs: dict[str, Tensor], txt_lengths: tuple[int, ...]) -> Call:
    """The same of every sample alone, without padding."""
    steps = []
    for i, length in enumerate(txt_lengths):
        own = {name: tensor if name == "img_ids" else tensor[i : i + 1] for name, tensor in inputs.items()}
        steps.append(prepared_step(model, own | {"txt": own["txt"][:, :length]}))
    return lambda: torch.cat([step() for step in steps])


def replayed(step: Call) -> Call:
    """`step` as a CUDA graph, recorded at the first call; the result is the one that each replay overwrites."""
    made = {}

    def call() -> Tensor:
        if not made:
            made["replay"] = capture(lambda: made.update(result=step()))
        made["replay"]()
        return made["result"]

    return call


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def check_e4m3(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise Missing("e4m3 needs sm_89 or newer")


def diffusers_peer(ours: FluxTransformer, device: str, attention: str) -> nn.Module:
    """diffusers' model on our weights, attending as ours does."""
    if not has_diffusers():
        raise Missing(MISSING)
    return diffusers_flux(ours, device, attention)


def compiled_peer(peer: nn.Module) -> nn.Module:
    peer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return peer


def torchao_fp8(peer: nn.Module, ours: FluxTransformer) -> nn.Module:
    """Quantize in place; torchao's own settings of Inductor are left alone, as for the other compiled sides."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    names = quantized_names(ours)
    quantize_(peer, config, filter_fn=lambda module, name: name in names)
    return peer


def quantized_names(ours: FluxTransformer) -> set[str]:
    """diffusers' names of the linears that `quantize="fp8"` takes."""
    names = set()
    for name in quantizable(ours):
        if name.endswith("add_qkv_proj"):
            names |= {name.replace("add_qkv_proj", f"add_{part}_proj") for part in "qkv"}
        elif name.endswith("to_qkv"):
            names |= {name.replace("to_qkv", f"to_{part}") for part in "qkv"}
        else:
            names.add(name)
    return names
