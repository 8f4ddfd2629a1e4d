"""A small DiT, jobs for it without encoders, and stand-ins for what records CUDA graphs."""

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uniworld.engine.denoiser import Denoiser
from uniworld.engine.graphs import StepGraphs
from uniworld.engine.request import Job, Request
from uniworld.models.conditioning import Conditioning
from uniworld.models.flux import FluxConfig, FluxTransformer

HEIGHT, WIDTH = 64, 80  # 20 tokens
WIDTHS = {"in_channels": 16, "joint_attention_dim": 48, "pooled_projection_dim": 32}
BLOCKS = {"num_layers": 2, "num_single_layers": 3}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
CONFIG = FluxConfig(**WIDTHS, **BLOCKS, **HEADS)


def make_dit(dtype=torch.float32, device="cpu", **changes) -> FluxTransformer:
    torch.manual_seed(0)
    model = FluxTransformer(replace(CONFIG, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return model.to(device, dtype).eval().requires_grad_(False)


def make_denoiser(recorder=None, setting="auto", model=None, **limits) -> Denoiser:
    """With CUDA graphs as `recorder` stands in for them; without one, as on this machine."""
    return Denoiser(model or make_dit(), graphs=StepGraphs(setting, recorder=recorder, **limits))


def make_job(seed: int, num_txt: int = 7, model=None, height: int = HEIGHT, width: int = WIDTH, **settings) -> Job:
    """A job whose conditioning is drawn from its seed; a negative one of 4 tokens with true CFG."""
    config = model.config if model else CONFIG
    weight = model.x_embedder.weight if model else torch.empty(0)
    generator = torch.Generator().manual_seed(seed)

    def conditioning(length: int) -> Conditioning:
        txt = torch.randn(1, length, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
        return Conditioning(txt.to(weight), (length,), pooled.to(weight))

    request = Request(prompt="", **{"num_inference_steps": 6, "guidance_scale": 3.5, **settings})
    job = Job(request=request, height=height, width=width, seed=seed, inputs=None)
    job.conditioning = conditioning(num_txt)
    job.negative = conditioning(4) if request.true_cfg_scale > 1 else None
    return job


def draw(denoiser: Denoiser, *jobs: Job) -> list[Job]:
    denoiser.run(list(jobs))
    return list(jobs)


class OpRecorder(TorchDispatchMode):
    """Records ops as a CUDA graph records kernels: on the tensors they were called with, and without effect."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.before.setdefault(id(args[0]), (args[0], args[0].clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        """Run the ops again; results go where they went when they were recorded."""
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeRecorder:
    """Stands in for CudaRecorder on a CPU."""

    device_type = "cpu"

    def __init__(self, num_bytes: int = 0, error: Exception | None = None):
        self.num_bytes, self.error = num_bytes, error
        self.num_recorded = self.num_replayed = 0

    def warm_up(self, body) -> None:
        body()

    def record(self, body):
        if self.error:
            raise self.error
        self.num_recorded += 1
        with OpRecorder() as recorded:
            body()
        recorded.undo()

        def replay() -> None:
            self.num_replayed += 1
            recorded.replay()

        return replay, self.num_bytes
