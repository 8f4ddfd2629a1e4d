"""Sizes of the trained `tiny`: what changes of the configs in `tiny_configs`.

All parts together hold fewer than 15 M parameters, so that the package ships them in bf16 in under 30 MB. Pictures are
128 px: 16x16 latents, 64 tokens of the DiT; the VLM sees them at 168 px, 36 tokens.
"""

from typing import Any

from uniworld.checkpoint import tiny_configs

SIZE_PX = 128
VLM_PX = 168 * 168
HIDDEN = 192  # of the VLM, and width of the DiT's text

VAE: dict[str, Any] = tiny_configs.VAE | {"block_out_channels": [16, 32, 64, 64], "sample_size": SIZE_PX}
PREPROCESSOR: dict[str, Any] = tiny_configs.PREPROCESSOR | {"max_pixels": VLM_PX}
VISION: dict[str, Any] = tiny_configs.VISION | {
    "depth": 4,
    "fullatt_block_indexes": [0, 1, 2, 3],
    "hidden_size": 128,
    "intermediate_size": 384,
    "out_hidden_size": HIDDEN,
}
SIGLIP: dict[str, Any] = tiny_configs.SIGLIP | {
    "hidden_size": 160,
    "image_size": SIZE_PX,
    "intermediate_size": 480,
    "num_attention_heads": 5,
    "num_hidden_layers": 4,
}
DENOISER: dict[str, Any] = tiny_configs.DENOISER | {
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "joint_attention_dim": HIDDEN,
    "num_attention_heads": 7,
}
SIGLIP_PREPROCESSOR: dict[str, Any] = tiny_configs.SIGLIP_PREPROCESSOR | {
    "size": {"height": SIZE_PX, "width": SIZE_PX},
}


def qwen_config(ids: dict[str, int]) -> dict[str, Any]:
    """The VLM's config.json; `ids` as for `tiny_configs.qwen_config`."""
    return tiny_configs.qwen_config(ids) | {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "max_window_layers": 4,
        "num_hidden_layers": 4,
        "rope_scaling": {"mrope_section": [8, 8, 8], "rope_type": "default", "type": "default"},
        "vision_config": VISION,
    }


def t5_config(ids: dict[str, int]) -> dict[str, Any]:
    """T5's config.json, without dropout: no text comes twice; `ids` as for `tiny_configs.t5_config`."""
    return tiny_configs.t5_config(ids) | {"d_ff": 2 * HIDDEN, "d_model": HIDDEN, "dropout_rate": 0.0}
