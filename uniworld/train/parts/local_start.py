"""A vision tower whose attention starts local: transformers need many pictures to learn what convolutions start with.

Source: d'Ascoli et al., 2021, "ConViT", section 3, where heads start as the cells of a convolution. There, positions
have weights of their own; here the rotary embedding does it: queries and keys that are the same everywhere, but for a
turn, attend by distance alone.
"""

import math

import torch
from torch import Tensor, nn

SHARPNESS = 2.0  # of the logits at distance 0, for each frequency and axis
NUM_FREQUENCIES = 2  # the highest: an angle of 1 and of 0.3 a patch
OFFSETS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns from a patch to the one that a head looks at, in turn


@torch.no_grad()
def start_local(visual: nn.Module) -> None:
    """Set the biases of queries and keys in every block of Qwen2.5-VL's vision tower; their weights stay small."""
    config = visual.config
    head_dim = config.hidden_size // config.num_heads
    frequencies = visual.rotary_pos_emb.inv_freq.float().cpu()
    for block in visual.blocks:
        bias = torch.zeros(3, config.num_heads, head_dim)
        for head in range(config.num_heads):
            bias[0, head], bias[1, head] = _query_and_key(head_dim, frequencies, OFFSETS[head % len(OFFSETS)])
        block.attn.qkv.bias[: 2 * config.hidden_size].copy_(bias[:2].flatten())


def _query_and_key(head_dim: int, frequencies: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[head_dim] each; their product, turned by the rotary embedding, is largest where the key stands `offset` away.

    The first half of a head's channels pairs with the second; of each half, rows come before columns.
    """
    half, length = head_dim // 2, math.sqrt(SHARPNESS * math.sqrt(head_dim))
    query, key = torch.zeros(head_dim), torch.zeros(head_dim)
    for axis, away in enumerate(offset):
        for number, frequency in enumerate(frequencies[:NUM_FREQUENCIES].tolist()):
            channel = axis * (half // 2) + number
            query[channel] = length
            key[channel] = length * math.cos(frequency * away)
            key[half + channel] = -length * math.sin(frequency * away)
    return query, key
