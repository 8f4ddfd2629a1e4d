"""`torch.compile` of the DiT's blocks, once for all sizes."""

import sys
import time

import torch

from uniworld.models import flow
from uniworld.models.flux import FluxTransformer

# 143 and 101 tokens: numbers that no size of a model equals. A dimension equal to one that cannot change would be taken
# to be the same one, and be compiled for that length alone.
WARM_UP_PX, WARM_UP_TXT = (176, 208), 101


def compile_blocks(denoiser: FluxTransformer) -> None:
    """Compile both kinds of block, each as one graph with our ops inside, for any number of tokens.

    All blocks of a kind share the code. It is compiled again where a batch of one becomes a batch of several, and
    where LoRA factors come to stand beside other linears. A padded batch leaves the graph for its attention.
    """
    for block in (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks):
        block.forward = torch.compile(block.forward, dynamic=True)


@torch.inference_mode()
def warm_up(denoiser: FluxTransformer, told: bool) -> float:
    """Compile now, on a small pass, rather than in the first request; returns seconds, and says them on stderr."""
    if told:
        print("compiling the DiT's blocks, once for all sizes ... ", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    config, like = denoiser.config, denoiser.x_embedder.weight
    ids = flow.image_ids(*WARM_UP_PX, like.device)
    denoiser.denoise(
        like.new_zeros(1, ids.shape[0], config.in_channels),
        like.new_zeros(1, WARM_UP_TXT, config.dim),
        like.new_zeros(1, config.num_modulations * config.dim),
        denoiser.rope(ids),
    )
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    seconds = time.perf_counter() - start
    if told:
        print(f"{seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds
