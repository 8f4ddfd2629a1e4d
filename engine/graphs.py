"""CUDA graphs of one denoising step: recorded once a shape, replayed for every step, bounded in number and memory.

A graph repeats kernels on fixed addresses. So a step is recorded on buffers that stay, and before a replay the inputs
of that step are copied into them. A graph holds for one exact length of the text: to round lengths up, attention would
have to mask the padding, which is another kernel than the one eager steps call, and a graph gives the bits of eager.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from uniworld.engine.request import StepCacheReport
from uniworld.engine.steps import PreparedBatch
from uniworld.kernels.flow_step import flow_step

MAX_GRAPHS = 8
MAX_BYTES = 4 * 2**30  # of all graphs together, buffers included
MIN_STEPS = 4  # recording costs the host about two steps
GraphSetting = bool | Literal["auto"]
Body = Callable[[], None]


class Recorder(Protocol):
    """Records the kernels that a function launches."""

    device_type: str

    def warm_up(self, body: Body) -> None:
        """Run `body` as it will be recorded, so that libraries set up what cannot be set up while recording."""

    def record(self, body: Body) -> tuple[Body, int]:
        """Record `body` without running it; what replays it, and the bytes that the recording holds."""


class CudaRecorder:
    """Records on a stream of its own, into memory that belongs to the graph."""

    device_type = "cuda"

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None

    def warm_up(self, body: Body) -> None:
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, body: Body) -> tuple[Body, int]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # else `graph` empties it, and the difference below means nothing
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            body()
        return graph.replay, max(0, torch.cuda.memory_reserved() - before)


class StepBuffers:
    """The inputs of a step at addresses that stay, and the step on them; `latents` is replaced in place."""

    def __init__(self, batch: PreparedBatch):
        self.model, self.dtype, self.true_cfg_scale = batch.model, batch.dtype, batch.true_cfg_scale
        self.pe = batch.pe  # the same in every batch of this size
        self.latents = torch.empty_like(batch.latents)
        self.dsigma = torch.empty_like(batch.dsigma[:1])
        self.txt = [torch.empty_like(prepared.txt) for prepared in batch.passes]
        self.modulation = [torch.empty_like(prepared.table[0]) for prepared in batch.passes]

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.pe, self.latents, self.dsigma, *self.txt, *self.modulation))

    def load(self, batch: PreparedBatch) -> None:
        self.latents.copy_(batch.latents)
        for buffer, prepared in zip(self.txt, batch.passes):
            buffer.copy_(prepared.txt)

    def load_step(self, batch: PreparedBatch, step: int) -> None:
        self.dsigma.copy_(batch.dsigma[step : step + 1])
        for buffer, prepared in zip(self.modulation, batch.passes):
            buffer.copy_(prepared.table[step])

    def run(self) -> None:
        """One step; the sequence of ops is that of `EagerSteps.step`."""
        latents = self.latents.to(self.dtype)
        velocities = [
            self.model.denoise(latents, txt, modulation, self.pe) for txt, modulation in zip(self.txt, self.modulation)
        ]
        scale = self.true_cfg_scale
        self.latents.copy_(flow_step(self.latents, velocities[0], self.dsigma, *velocities[1:], true_cfg_scale=scale))


@dataclass(frozen=True)
class Graph:
    buffers: StepBuffers
    replay: Body
    num_bytes: int


class StepGraphs:
    """The graphs of one DiT, the least recently used first to go."""

    def __init__(
        self,
        setting: GraphSetting = "auto",
        *,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int = MAX_BYTES,
        recorder: Recorder | None = None,
    ):
        """`setting`: "auto" records what can be recorded and runs the rest eagerly; True raises where recording fails;
        False never records."""
        if setting not in ("auto", True, False):
            raise ValueError(f"cuda_graphs={setting!r}: must be 'auto', True or False")
        self.setting, self.max_graphs, self.max_bytes = setting, max_graphs, max_bytes
        self.recorder = recorder or CudaRecorder()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._too_large: OrderedDict[Hashable, str] = OrderedDict()
        self._broken = ""  # why nothing can be recorded here

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def num_bytes(self) -> int:
        return sum(graph.num_bytes for graph in self._graphs.values())

    def clear(self) -> None:
        """Forget all graphs: for whoever changes the model in a way that addresses and shapes do not show."""
        self._graphs.clear()
        self._too_large.clear()

    def forbid(self, why: str) -> None:
        """Record nothing from now on: for whoever lets steps do what a recording must not hold.

        Raises: ValueError where graphs are required.
        """
        if self.setting is True:
            raise ValueError(f"cuda_graphs=True: {why}")
        self.clear()
        self._broken = why

    def check_device(self, device: torch.device) -> None:
        """Raise a ValueError where graphs are required and this device has none."""
        if self.setting is True and device.type != self.recorder.device_type:
            raise ValueError(f"cuda_graphs=True: needs a CUDA device, the model is on {device}")

    def why_eager(self, batch: PreparedBatch, cache: str | None) -> str:
        """Why a batch cannot be drawn with a graph; "" where it can. `cache`: the step cache it asks for."""
        device = batch.latents.device
        if self.setting is False:
            return "CUDA graphs are switched off"
        if self._broken:
            return self._broken
        if device.type != self.recorder.device_type:
            return f"the model is on {device}, not on a CUDA device"
        if cache is not None:
            return f"cache={cache!r} chooses what a step computes"
        if any(prepared.txt_lengths for prepared in batch.passes):
            return "texts of unequal length share the batch"
        if any(weight.device != device for weight in batch.model.parameters()):
            return f"not all weights are on {device}"
        key = batch.graph_key
        if batch.num_steps < MIN_STEPS and key not in self._graphs:
            return f"fewer than {MIN_STEPS} steps do not pay for recording"
        return self._too_large.get(key, "")

    def steps(self, batch: PreparedBatch) -> "GraphSteps":
        key = batch.graph_key
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return GraphSteps(self, key, batch, self._graphs.get(key))

    def record(self, key: Hashable, buffers: StepBuffers) -> tuple[Body, str]:
        """Record a step that has run on `buffers`; what runs the next ones, and why that is not a graph ("": it is)."""
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        try:
            replay, num_bytes = self.recorder.record(buffers.run)
        except torch.OutOfMemoryError:
            return buffers.run, self._refuse(key, "no memory left for a graph of this size")
        except RuntimeError as error:
            if self.setting is True:
                raise
            self._broken = f"recording failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            return buffers.run, self._broken
        graph = Graph(buffers, replay, num_bytes + buffers.num_bytes)
        if graph.num_bytes > self.max_bytes:
            sizes = f"{graph.num_bytes / 2**30:.2f} GiB, more than the {self.max_bytes / 2**30:.2f} GiB allowed"
            return buffers.run, self._refuse(key, f"a graph of this size takes {sizes}")
        self._graphs[key] = graph
        while self.num_bytes > self.max_bytes:
            self._graphs.popitem(last=False)
        return replay, ""

    def _refuse(self, key: Hashable, why: str) -> str:
        self._too_large[key] = why
        while len(self._too_large) > 16 * self.max_graphs:
            self._too_large.popitem(last=False)
        return why


def graphs_for_engine(
    setting: GraphSetting,
    device: torch.device,
    *,
    parallel: bool = False,
    offload: str | None = None,
    report_error: bool = False,
) -> StepGraphs:
    """The graphs of an engine on `device`; `parallel`: several processes draw together.

    Raises: ValueError where graphs are required and cannot be.
    """
    graphs = StepGraphs(setting)
    graphs.check_device(device)
    if parallel:
        graphs.forbid("with sequence_parallel a step waits for other processes, which is not recorded")
    elif offload == "cpu":
        graphs.forbid("with offload='cpu' weights arrive during a step, which is not recorded")
    elif report_error:
        graphs.forbid("report_error compares every step with the unquantized DiT")
    return graphs


class GraphSteps:
    """Takes steps by replaying a graph, which the first step records where there is none yet."""

    def __init__(self, graphs: StepGraphs, key: Hashable, batch: PreparedBatch, graph: Graph | None):
        self.graphs, self.key, self.batch = graphs, key, batch
        self.buffers = graph.buffers if graph else StepBuffers(batch)
        self.buffers.load(batch)
        self._next: Body | None = graph.replay if graph else None
        self.how = "graph"

    def step(self, step: int) -> torch.Tensor:
        """As `EagerSteps.step`."""
        self.buffers.load_step(self.batch, step)
        if self._next is not None:
            self._next()
        else:
            self.graphs.recorder.warm_up(self.buffers.run)  # counts as this step
            self._next, why = self.graphs.record(self.key, self.buffers)
            self.how = f"eager: {why}" if why else "graph, recorded for this shape"
        return self.buffers.latents.clone()

    def reports(self) -> list[StepCacheReport | None]:
        return [None] * len(self.batch.latents)
