"""Interleaved timing on a CPU or a GPU.

A side is a list of calls that do the same work on different inputs; a GPU side has enough of them to overflow the L2
cache. Sides are timed in turn, forwards and then backwards (A B B A), so that a drift of the machine hits all of them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
WARMUP_CALLS = 2
ROUNDS = 9


@dataclass
class Samples:
    """Seconds a call, one entry a sample; `method` says what the clock was around."""

    method: str
    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_row(self) -> dict[str, float | int | str]:
        ordered = sorted(self.seconds)
        return {
            "median_s": self.median,
            "min_s": ordered[0],
            "max_s": ordered[-1],
            "samples": len(ordered),
            "calls_a_sample": self.calls,
            "timing": self.method,
        }


def interleave(
    sides: dict[str, Sequence[Call]],
    *,
    rounds: int = ROUNDS,
    sample_s: float = 0.02,
    graphs: bool = False,
    device: str = "cpu",
    warmup: int = WARMUP_CALLS,
) -> dict[str, Samples]:
    """Time every side `rounds` times.

    Args:
        sides: the calls of each side.
        rounds: samples a side; an odd number has a middle one.
        sample_s: least duration of a sample; short calls are repeated to reach it.
        graphs: on a GPU, replay each side as a CUDA graph, so that launch gaps stay out of the numbers.
        device: "cpu" or "cuda".
        warmup: untimed calls of each side; none and `sample_s` 0 for long calls that have run before.

    Returns: the samples of each side.
    """
    runners = {name: _runner(calls, graphs, device, warmup) for name, calls in sides.items()}
    samples = {}
    for name, (run, method, calls_a_run) in runners.items():
        once = min(_timed(run, 1, device) for _ in range(3)) if sample_s else 1.0
        repeats = max(1, round(sample_s / max(once, 1e-7)))
        samples[name] = Samples(method, repeats * calls_a_run)
    order = list(runners)
    for _ in range(rounds):
        for name in order:
            run, _, calls_a_run = runners[name]
            repeats = samples[name].calls // calls_a_run
            samples[name].seconds.append(_timed(run, repeats, device) / samples[name].calls)
        order.reverse()
    return samples


def _runner(calls: Sequence[Call], graphs: bool, device: str, warmup: int) -> tuple[Call, str, int]:
    """(one pass over all calls, how it is timed, calls in a pass), warmed up."""
    for _ in range(warmup):
        for call in calls:
            call()

    def run() -> None:
        for call in calls:
            call()

    if device != "cuda":
        return run, "wall clock", len(calls)
    torch.cuda.synchronize()
    if graphs:
        try:
            return capture(run), "cuda graph", len(calls)
        except RuntimeError as error:  # what cannot be captured is timed launch by launch, and its row says so
            print(f"not captured as a CUDA graph: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
    return run, "cuda events", len(calls)


def capture(run: Call) -> Call:
    """`run` as a CUDA graph: what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _timed(run: Call, repeats: int, device: str) -> float:
    """Seconds of `repeats` passes."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


class ReplayClock:
    """A clock that advances by measured samples, so that pytest-benchmark's table shows an interleaved measurement.

    pytest-benchmark times one side after the other, with the host's clock. Sides here are timed in turn and, on a GPU,
    with device events; `show` hands the finished samples to the `benchmark` fixture.
    """

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def show(self, benchmark, samples: Samples) -> None:
        remaining = iter(samples.seconds)

        def advance() -> None:
            self.now += next(remaining, 0.0)

        benchmark.pedantic(advance, rounds=len(samples.seconds), iterations=1)


CLOCK = ReplayClock()
