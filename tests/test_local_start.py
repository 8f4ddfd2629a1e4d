"""A vision tower whose heads start as the cells of a convolution."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from uniworld.models.vlm import VisionLanguageModel
from uniworld.train.parts.local_start import OFFSETS, start_local
from uniworld.train.parts.sizes import qwen_config

SPECIAL = ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
IDS = {f"<|{name}|>": number for number, name in enumerate(SPECIAL)} | {"vocab_size": 32}
SIDE = 9


def test_heads_look_at_the_patches_beside():
    """Through transformers' own rotary embedding: most at their offset, and at what is next to it."""
    config = qwen_config(IDS)
    visual = VisionLanguageModel.from_config(config).model.model.visual
    before = [block.attn.qkv.bias.clone() for block in visual.blocks]
    start_local(visual)
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    frequencies = visual.rotary_pos_emb.inv_freq
    angles = torch.cat([places[:, :1] * frequencies, places[:, 1:] * frequencies], dim=1).repeat(1, 2)
    for block, was in zip(visual.blocks, before):
        D, H = visual.config.hidden_size, visual.config.num_heads
        assert torch.equal(block.attn.qkv.bias[2 * D :], was[2 * D :])  # values stay as they are
        query, key = (block.attn.qkv.bias[i * D : (i + 1) * D].view(H, D // H).expand(SIDE**2, -1, -1) for i in (0, 1))
        query, key = apply_rotary_pos_emb_vision(query, key, angles.cos(), angles.sin())
        weights = (torch.einsum("qhd,khd->hqk", query, key) / (D // H) ** 0.5).softmax(-1)
        middle = SIDE**2 // 2
        for head, offset in enumerate(OFFSETS):
            seen = weights[head, middle].view(SIDE, SIDE)
            at = torch.tensor([SIDE // 2 + away for away in offset])
            assert seen.argmax() == at[0] * SIDE + at[1]
            assert seen[at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2].sum() > 0.8
