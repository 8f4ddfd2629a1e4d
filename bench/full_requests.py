"""Whole requests at full size: the engine in bf16, in FP8 and with step caches, and diffusers' parts."""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from deadline import COMPILE_S, Deadline, Missing
from full_cases import Case, Scale, noise_pictures
from full_model import random_uniworld
from full_steps import Measured, check_e4m3, compiled_peer, diffusers_peer
from peers import relative_error, same_attention
from residents import measure_once, own_bytes, without_frames
from timing import Call, Samples, interleave
from torch import Tensor, nn

from uniworld.engine import Engine
from uniworld.engine.cache import ConditioningCache
from uniworld.engine.quantize import quantized_copy
from uniworld.engine.request import Request
from uniworld.models.unified import UniWorld

OURS, FP8, FIRST_BLOCK, TAYLOR = "ours", "ours, fp8", "ours, first-block cache", "ours, taylor cache"
EAGER, PEER_COMPILED, AUTHORS = "diffusers eager", "diffusers compiled", "the authors' flow"
TOGETHER, ONE_BY_ONE = "ours", "ours, one after the other"  # of requests that are served together
CACHES = {FIRST_BLOCK: {"cache": "first_block"}, TAYLOR: {"cache": "taylor"}}
PROMPT = "Make it look like a watercolour painting of a quiet harbour in the evening, with warm light on the water"
MIN_ROUNDS, MAX_ROUNDS = 2, 9
OUTSIDE = ("tokenize", "preprocess", "connectors")  # words and the VLM's pictures; SigLIP's pictures; both connectors


def request_sides(case: Case, largest_px: int) -> tuple[str, ...]:
    """The most wanted first. The compiled peer only at the largest size: every shape costs it a compilation."""
    sides = (OURS, EAGER, FP8, AUTHORS, FIRST_BLOCK, TAYLOR)
    if case.num_references > 1:
        return sides[:4]
    return (*sides, PEER_COMPILED) if case.size_px == largest_px else sides


class RequestBench:
    """One set of random weights, and what draws with it."""

    def __init__(self, scale: Scale, device: str, dtype: torch.dtype, *, may_compile: bool = True):
        self.scale, self.device, self.dtype, self.may_compile = scale, device, dtype, may_compile
        self.model = random_uniworld(scale.size, device, dtype)
        self.ours = Engine(self.model)
        self.deadline = Deadline()

    @functools.cached_property
    def fp8(self) -> Engine:
        check_e4m3(self.device)
        return Engine(replace(self.model, denoiser=quantized_copy(self.model.denoiser, "fp8")))

    @functools.cached_property
    def eager(self) -> nn.Module:
        return diffusers_peer(self.model.denoiser, self.device, self.ours.attention.name)

    @functools.cached_property
    def compiled(self) -> nn.Module:
        if not self.may_compile:
            raise Missing("nothing is compiled in this run")
        return compiled_peer(diffusers_peer(self.model.denoiser, self.device, self.ours.attention.name))

    def settings(self, case: Case, num_steps: int) -> dict[str, int]:
        return {"height": case.size_px, "width": case.size_px, "num_inference_steps": num_steps, "seed": 7}

    def measure(self, case: Case) -> dict[str, Measured | Exception]:
        """What every side of a case measures, or the exception that it raised; ours and eager diffusers in any case,
        the others as far as there is time for them and for the rounds of all."""
        found, calls, latents, seconds = {}, {}, {}, {}
        for side in request_sides(case, max(self.scale.sides_px)):
            try:
                self._keep_time(side, seconds)
                call, modules = self._call(side, case)
                own, began = own_bytes(*modules), time.time()
                (latents[side], more), peak = measure_once(call, own, self.device, once=side != PEER_COMPILED)
                seconds[side] = time.time() - began
                found[side] = Measured(Samples(""), peak, self.ours.attention.name, more=more)
                calls[side] = call
            except Missing as error:
                found[side] = error.with_traceback(None)
            except Exception as error:  # one side that fails must not hide the others
                found[side] = without_frames(error)
        rounds = self._rounds(sum(seconds.values()))
        timed = interleave(
            {s: [c] for s, c in calls.items()}, rounds=rounds, sample_s=0.0, device=self.device, warmup=0
        )
        for side, samples in timed.items():
            found[side].samples = samples
            if EAGER in latents and side != EAGER:
                found[side].error = relative_error(latents[side], latents[EAGER])
        return found

    def _rounds(self, seconds_a_round: float) -> int:
        """As many as half of the time that is left allows: what is measured next needs the other half."""
        left = self.deadline.left_s / 2
        return MAX_ROUNDS if left == math.inf else max(MIN_ROUNDS, min(MAX_ROUNDS, int(left / seconds_a_round)))

    def _keep_time(self, side: str, seconds: dict[str, float]) -> None:
        """Raises: NoTime where too little is left for one side more, each of which took so long."""
        if side not in (OURS, EAGER) and seconds:
            first = max(seconds.values()) + (COMPILE_S if side == PEER_COMPILED else 0.0)
            self.deadline.keep(first + MIN_ROUNDS * (sum(seconds.values()) + max(seconds.values())))

    def _call(self, side: str, case: Case) -> tuple[Call, list[nn.Module]]:
        """What draws, and the modules that it needs."""
        settings = self.settings(case, self.scale.num_steps)
        images = noise_pictures(case.num_references)
        if side in (EAGER, PEER_COMPILED, AUTHORS):
            from original import OriginalPipeline

            transformer = self.compiled if side == PEER_COMPILED else self.eager
            pipeline = OriginalPipeline(self.model, transformer, as_authors=side == AUTHORS)
            draw = functools.partial(self._draw_theirs, pipeline, images, settings)
            return draw, [*parts(self.model), transformer]
        engine = self.fp8 if side == FP8 else self.ours
        draw = functools.partial(draw_ours, engine, images, settings | CACHES.get(side, {}))
        return draw, [*parts(self.model), engine.model.denoiser]

    def _draw_theirs(self, pipeline, images: list, settings: dict) -> tuple[Tensor, dict[str, Any]]:
        with same_attention(self.device, self.ours.attention.name):
            return pipeline.draw(images, PROMPT, **settings)[0], {}

    def together(self, case: Case) -> dict[str, Measured]:
        """Edits whose words differ in number, `case.batch` in one call of `Engine.run`, and one after the other.
        Their error is that of all final latents to those of requests alone."""
        engine = Engine(self.model, max_batch_size=case.batch)
        settings, images = self.settings(case, self.scale.num_steps), noise_pictures(case.num_references)
        words = PROMPT.split()
        ends = [len(words) * (case.batch + 1 + i) // (2 * case.batch) for i in range(case.batch)]
        requests = [Request(prompt=" ".join(words[:end]), images=images, **settings) for end in ends]

        def draw(groups: list[list[Request]]) -> Tensor:
            engine.conditioner.cache = ConditioningCache()
            return torch.cat([result.latents for group in groups for result in engine.run(group)])

        calls = {TOGETHER: lambda: draw([requests]), ONE_BY_ONE: lambda: draw([[request] for request in requests])}
        latents, seconds = {}, {}
        for side, call in calls.items():
            began = time.time()
            latents[side] = call()
            seconds[side] = time.time() - began
        rounds = self._rounds(sum(seconds.values()))
        sides = {side: [call] for side, call in calls.items()}
        timed = interleave(sides, rounds=rounds, sample_s=0.0, device=self.device, warmup=0)
        error = relative_error(latents[TOGETHER], latents[ONE_BY_ONE])
        attention = self.ours.attention.name
        return {side: Measured(timed[side], None, attention, error if side == TOGETHER else None) for side in calls}

    def overhead(self, case: Case, rounds: int = MAX_ROUNDS) -> tuple[Samples, dict[str, float]]:
        """Seconds of a request outside of every model, after one request unmeasured; and the median seconds in each
        model and in each of `OUTSIDE`, which are pieces of the time outside."""
        images = noise_pictures(case.num_references)
        settings = self.settings(case, self.scale.overhead_steps)
        samples, clocks = Samples("wall clock, the device waited for around every model"), []
        for _ in range(rounds + 1):
            clock = PartClock(self.device)
            with watched(self.ours, clock):
                began = clock.now()
                draw_ours(self.ours, images, settings)
                total = clock.now() - began
            samples.seconds.append(total - sum(clock.seconds[part] for part in clock.seconds if part not in OUTSIDE))
            clocks.append(clock.seconds)
        del samples.seconds[0], clocks[0]
        medians = {part: Samples("", seconds=[clock[part] for clock in clocks]).median for part in clocks[0]}
        return samples, medians


class PartClock:
    """Seconds inside watched calls by part; a watched call inside another belongs to the outer one."""

    def __init__(self, device: str):
        self.device, self.seconds, self._inside = device, Counter(), False

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, call: Callable, part: str) -> Callable:
        def timed(*args, **kwargs):
            if self._inside:
                return call(*args, **kwargs)
            self._inside, began = True, self.now()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - began
                self._inside = False

        return timed


@contextmanager
def watched(engine: Engine, clock: PartClock) -> Iterator[None]:
    """Inside, `clock` sees every model of an engine run, and apart from them what `OUTSIDE` names."""
    model, texts = engine.model, engine.model.text_encoders
    points = [
        (model.vlm, "encode", "vlm"),
        (model.semantic_encoder, "forward", "siglip"),
        (texts.clip, "forward", "clip"),
    ]
    points += [(texts.t5, "forward", "t5")] if texts.has_t5 else []
    points += [(engine.denoiser.model, name, "dit") for name in ("embed_txt", "modulation", "rope")]
    points += [(engine.denoiser, "_loop", "dit"), (model.vae, "decode", "vae")]
    points += [(engine.conditioner, "tokenize", "tokenize"), (model.semantic_encoder, "preprocess", "preprocess")]
    points += [(projector, "forward", "connectors") for projector in (model.denoise_projector, model.siglip_projector)]
    with ExitStack() as stack:
        for owner, name, part in points:
            stack.enter_context(mock.patch.object(owner, name, clock.around(getattr(owner, name), part)))
        yield


def parts(model: UniWorld) -> list[nn.Module]:
    """All modules but the DiT."""
    connectors = [model.denoise_projector, model.siglip_projector]
    return [model.vlm, model.semantic_encoder, model.text_encoders, model.vae, *connectors]


def draw_ours(engine: Engine, images: list, settings: dict) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and what goes into the row: seconds by room, how steps were taken, how many a step cache saved.

    Nothing is known of earlier requests.
    """
    engine.conditioner.cache = ConditioningCache()
    result = engine.edit(images, PROMPT, **settings) if images else engine.generate(PROMPT, **settings)
    more = {"rooms_s": result.timings, "graphs": result.graphs}
    if result.step_cache is not None:
        more["saved_steps"] = result.step_cache.num_saved
    return result.latents, more
