"""Measures what a few training steps allocate: python memory_worker.py {profiler,live} CONFIG...

Each CONFIG is a `TrainConfig` as JSON. Rank 0 prints a JSON list of the peak bytes of each, between the end of the
construction and the last step. "profiler" sums the CPU allocator's own events, "live" the storages that live.
"""

import gc
import json
import sys
import time
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from uniworld.checkpoint.precision import cpu_has_fast_bf16
from uniworld.config import TrainConfig, from_dict
from uniworld.kernels import extension
from uniworld.models.flux import FluxConfig
from uniworld.train import sharding
from uniworld.train.blocks import prepare_blocks
from uniworld.train.ema import ShardedEMA
from uniworld.train.lora import add_lora
from uniworld.train.memory import BatchShape, LiveBytes, ModelShape
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.stages import freeze_except, inserts_siglip, patterns_of
from uniworld.train.step import training_loss

NUM_STEPS = 3
SHAPE = ModelShape(
    denoiser=FluxConfig(
        num_layers=2,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=128,
        pooled_projection_dim=64,
    ),
    denoise_projector=(128, 512, 128),
    siglip_projector=(96, 512, 128),
)


class BF16ProductsLeftOut(TorchDispatchMode):
    """Tensors of the right size in the place of bf16 products and of the gradients of bf16 attention.

    Only memory is measured, and a CPU that does not compute in bf16 takes ten minutes for values nobody looks at.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default) and args[-1].dtype == torch.bfloat16:
            a, b = args[-2:]
            return a.new_full((*a.shape[:-1], b.shape[-1]), 0.01)
        attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        if func == attention_backward and args[0].dtype == torch.bfloat16:
            return tuple(torch.full_like(x, 0.01) for x in args[1:4])
        return func(*args, **kwargs or {})


def batch_shape(config: TrainConfig) -> BatchShape:
    num_siglip = 64 if inserts_siglip(config.stage) else 0
    size = config.data.batch_size
    return BatchShape(batch_size=size, height_px=256, width_px=256, num_vlm=100, num_siglip=num_siglip)


def random_batch(config: TrainConfig, dtype: torch.dtype) -> EncodedBatch:
    shape = batch_shape(config)
    B, latent = shape.batch_size, (shape.batch_size, 16, 32, 32)
    siglip = torch.randn(B, shape.num_siglip, SHAPE.siglip_projector[0]) if shape.num_siglip else None
    return EncodedBatch(
        vlm_states=torch.randn(B, shape.num_vlm, SHAPE.denoise_projector[0]),
        attention_mask=torch.ones(B, shape.num_vlm, dtype=torch.int64),
        image_ends=((50,),) * B,
        siglip_states=siglip,
        t5_states=None,
        pooled=torch.randn(B, SHAPE.denoiser.pooled_projection_dim),
        latent_mean=torch.randn(latent),
        latent_std=torch.rand(latent),
    ).to(torch.device("cpu"), dtype)


def build(config: TrainConfig, world: sharding.World) -> tuple[sharding.Sharded, ShardedEMA | None]:
    from uniworld.models.connectors import Connector
    from uniworld.models.flux import FluxTransformer

    torch.set_default_dtype(sharding.DTYPES[config.sharding.dtype])
    model = TrainModel(
        FluxTransformer(SHAPE.denoiser), Connector(*SHAPE.denoise_projector), Connector(*SHAPE.siglip_projector)
    )
    torch.set_default_dtype(torch.float32)
    # As the planner assumes, whichever CPU this is: with AMX nothing of a single block is copied together.
    model.denoiser.attention_backend = "sdpa"
    extension.CPU_FEATURES = frozenset({"amx_bf16"})
    if config.model.lora_rank is not None:
        add_lora(model.denoiser, config.model.lora_rank)
    freeze_except(model, patterns_of(config))
    prepare_blocks(model.denoiser, config.sharding)
    sharded = sharding.Sharded(model, config, world)
    return sharded, ShardedEMA(sharded, config.ema) if config.ema.enabled else None


def steps(config: TrainConfig, sharded: sharding.Sharded, ema: ShardedEMA | None) -> None:
    generator = torch.Generator().manual_seed(0)
    with nullcontext() if cpu_has_fast_bf16() else BF16ProductsLeftOut():
        for _ in range(NUM_STEPS):
            for _ in range(config.sharding.accumulation_steps):
                loss = training_loss(sharded, random_batch(config, sharded.dtype), config.flow, generator)
                sharded.backward_and_step(loss)
                del loss
            if ema is not None:
                ema.update()


def by_profiler(config: TrainConfig, world: sharding.World) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        sharded, ema = build(config, world)
        built_ns = time.time_ns()
        steps(config, sharded, ema)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now) if event.start_ns() > built_ns else 0
    return peak


def by_storages(config: TrainConfig, world: sharding.World) -> int:
    live = LiveBytes()
    with live:
        sharded, ema = build(config, world)
        gc.collect()
        live.peak = live.now
        steps(config, sharded, ema)
    return live.peak


def main() -> None:
    torch.set_num_threads(1)
    measure = {"profiler": by_profiler, "live": by_storages}[sys.argv[1]]
    world = sharding.init()
    peaks = []
    for text in sys.argv[2:]:
        peaks.append(measure(from_dict(TrainConfig, json.loads(text)), world))
        gc.collect()
    if world.rank == 0:
        print(json.dumps(peaks))
    sharding.exit_process(0)


if __name__ == "__main__":
    main()
