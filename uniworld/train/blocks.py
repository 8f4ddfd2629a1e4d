"""How the DiT's blocks run in training: recomputed in the backward pass, compiled, both or neither.

Names of parameters stay as they are, since only each block's `forward` is replaced.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from uniworld.config import ShardingConfig
from uniworld.models.flux import FluxTransformer


def prepare_blocks(denoiser: FluxTransformer, config: ShardingConfig) -> None:
    """Apply `compile_blocks` to every block and `checkpoint_blocks` to the kinds it names."""
    kinds = {"double": denoiser.transformer_blocks, "single": denoiser.single_transformer_blocks}
    for kind, blocks in kinds.items():
        for block in blocks:
            if config.compile_blocks:
                block.forward = torch.compile(block.forward)
            if kind in config.checkpoint_blocks:
                _recompute(block)


def _recompute(block: nn.Module) -> None:
    """Keep the block's inputs alone for the backward pass; nothing in a block is random."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
