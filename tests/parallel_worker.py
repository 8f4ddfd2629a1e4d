"""One process of the passes and pictures that `test_parallel` looks at: torchrun parallel_worker.py OUTPUT_DIR

Rank 0 writes OUTPUT_DIR/results.safetensors; every rank checks that the others hold the same bits.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from uniworld.checkpoint.tiny import random_tiny_dir
from uniworld.engine import Engine, Request
from uniworld.engine.parallel import ParallelFlux, join_launched
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.train.sharding import exit_process

CONFIG = {"in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24}
CONFIG |= {"attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": (4, 6, 6), "pooled_projection_dim": 8}
PASSES = {  # (rows and columns of image tokens, text tokens, valid ones of each sample)
    "even": ((4, 4), 6, None),
    "uneven": ((3, 5), 7, None),
    "padded": ((3, 3), 9, (9, 4)),
    "bf16": ((3, 5), 7, None),
}
DRAWN = {"num_inference_steps": 2, "height": 48, "width": 80}
REQUESTS = [
    Request(prompt="a cat", seed=1, **DRAWN),
    Request(prompt="a much longer prompt, so that the batch is padded", seed=2, guidance_scale=2.0, **DRAWN),
]
CACHED_STEPS = 5
CACHED = [
    Request(prompt="a cat", seed=3, cache=cache, cache_threshold=1.0, **{**DRAWN, "num_inference_steps": CACHED_STEPS})
    for cache in ("first_block", "taylor")
]


def small_flux(heads=4, dtype=torch.float32):
    torch.manual_seed(0)
    config = FluxConfig(**{**CONFIG, "num_attention_heads": heads})
    return FluxTransformer(config).requires_grad_(False).to(dtype)


def prepared(model, name):
    """The arguments of `denoise`."""
    (rows, columns), num_txt, lengths = PASSES[name]
    B, dtype = 1 if lengths is None else len(lengths), model.x_embedder.weight.dtype
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    img, txt = random(B, rows * columns, model.config.in_channels), random(B, num_txt, model.config.dim)
    return img, txt, random(B, model.config.num_modulations * model.config.dim), model.rope(ids), lengths


def same_on_all(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in others)
    return tensor


@torch.inference_mode()
def main(output):
    group, device = join_launched(None)
    results = {}
    for name in PASSES:
        model = small_flux(dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        results[name] = same_on_all(ParallelFlux(model, group).denoise(*prepared(model, name)))
    engine = Engine.from_pretrained(
        str(random_tiny_dir()), dtype="float32", device=device, progress=False, sequence_parallel=group
    )
    for index, result in enumerate(engine.run(REQUESTS)):
        results[f"picture{index}"] = same_on_all(result.latents)
        assert result.graphs.startswith("eager: with sequence_parallel a step waits for other processes")
    for index, result in enumerate(engine.run(CACHED)):
        results[f"cached{index}"] = same_on_all(result.latents)
        results[f"computed{index}"] = same_on_all(torch.tensor(result.step_cache.computed, dtype=torch.int64))

    def stop_after_one(info):  # only the last process wants to
        return not (dist.get_rank() == dist.get_world_size() - 1 and info.step == 1)

    stopped = engine.generate("a cat", on_step=stop_after_one, **{**DRAWN, "num_inference_steps": 5})
    results["stopped"] = same_on_all(stopped.latents)  # no seed given: all must have drawn the same one
    assert stopped.cancelled and stopped.images == []
    if dist.get_rank() == 0:
        save_file(results, output / "results.safetensors")
    exit_process(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
