"""UniWorld-V1 with random weights drawn on the device: at its full size, small for a CPU, or `tiny` for a dry run."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peers import fill_random
from torch import nn

from uniworld.checkpoint import tiny_configs
from uniworld.checkpoint.build import build_univa
from uniworld.checkpoint.convert import fresh_connector_shapes, univa_config
from uniworld.checkpoint.tiny_tokenizers import write_clip_tokenizer, write_qwen_tokenizer, write_t5_tokenizer
from uniworld.checkpoint.weights import parameters_on_meta
from uniworld.models.flux import FluxConfig
from uniworld.models.prompts import PromptProcessor
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.text_encoders import TextEncoders
from uniworld.models.unified import UniWorld
from uniworld.models.vae import ImageAutoencoder
from uniworld.models.vision_processor import VisionProcessor

# What differs from the configs of `tiny`: Qwen2.5-VL-7B, SigLIP2 so400m patch16 512, FLUX.1-dev, T5-XXL, CLIP-L.
VISION = {
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "vocab_size": 152064,
}
DENOISER = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "pooled_projection_dim": 768,
}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 512,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}
T5 = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024}

# What a part's config changes of the one of `tiny`.
Size = Mapping[str, Mapping[str, Any]]
TINY_SIZE: Size = {}
FULL_SIZE: Size = {
    "vision": VISION,
    "qwen": QWEN,
    "denoiser": DENOISER,
    "siglip": SIGLIP,
    "t5": T5,
    "clip": CLIP,
    "vae": VAE,
}
# A DiT of 120 M parameters beside a VLM of 80 M: near the proportions of the full size, in reach of a CPU.
SMALL_SIZE: Size = {
    "vision": {
        "depth": 4,
        "fullatt_block_indexes": [1, 3],
        "hidden_size": 320,
        "intermediate_size": 856,
        "num_heads": 4,
        "out_hidden_size": 512,
    },
    "qwen": {
        "hidden_size": 512,
        "intermediate_size": 2816,
        "max_window_layers": 16,
        "num_attention_heads": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
    },
    "denoiser": {
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "joint_attention_dim": 768,
        "num_attention_heads": 6,
        "num_layers": 3,
        "num_single_layers": 6,
    },
    "siglip": {
        "hidden_size": 320,
        "image_size": 256,
        "intermediate_size": 1280,
        "num_attention_heads": 5,
        "num_hidden_layers": 6,
    },
    "vae": {"block_out_channels": [16, 32, 64, 64], "layers_per_block": 2, "norm_num_groups": 16},
}


def denoiser_config(size: Size) -> FluxConfig:
    return FluxConfig.from_dict(tiny_configs.DENOISER | dict(size.get("denoiser", {})))


def random_uniworld(size: Size, device: str, dtype: torch.dtype, *, use_t5: bool = True) -> UniWorld:
    """Every part with random weights on `device`; the tokenizers are those of `tiny`, which know few merges.

    On "meta" there are shapes alone.
    """

    def changed(config: dict[str, Any], part: str) -> dict[str, Any]:
        return config | dict(size.get(part, {}))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ids, clip_ids, t5_ids = write_tokenizers(folder)
        tokenizers = read_tokenizers(folder)
    qwen = changed(tiny_configs.qwen_config(ids), "qwen")
    qwen["vision_config"] = changed(tiny_configs.VISION, "vision")
    config = univa_config(qwen, changed(tiny_configs.DENOISER, "denoiser"), ids)
    siglip = changed(tiny_configs.SIGLIP, "siglip")
    pixels = {"height": siglip["image_size"], "width": siglip["image_size"]}
    with parameters_on_meta():
        parts = build_univa(config, fresh_connector_shapes(config, siglip["hidden_size"]))
        semantic = SemanticEncoder.from_config(siglip, tiny_configs.SIGLIP_PREPROCESSOR | {"size": pixels})
        t5 = (changed(tiny_configs.t5_config(t5_ids), "t5"), tokenizers["t5"]) if use_t5 else ()
        text = TextEncoders.from_config(changed(tiny_configs.clip_config(clip_ids), "clip"), tokenizers["clip"], *t5)
        vae = ImageAutoencoder.from_config(changed(tiny_configs.VAE, "vae"))
    for index, module in enumerate((*parts.values(), semantic, text, vae)):
        materialise(module, device, dtype)
        if device != "meta":
            fill_random(module, seed=index)
    processor = PromptProcessor(tokenizers["qwen"], VisionProcessor(tiny_configs.PREPROCESSOR))
    return UniWorld(
        name="random weights",
        folder=Path(),
        config=config,
        processor=processor,
        semantic_encoder=semantic,
        text_encoders=text,
        vae=vae,
        random_weights=True,
        device=torch.device(device),
        dtype=dtype,
        **parts,
    )


def write_tokenizers(folder: Path) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    for name in ("qwen", "clip", "t5"):
        (folder / name).mkdir()
    qwen = write_qwen_tokenizer(folder / "qwen")
    return qwen, write_clip_tokenizer(folder / "clip"), write_t5_tokenizer(folder / "t5")


def read_tokenizers(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer, CLIPTokenizer, Qwen2Tokenizer

    classes = {"qwen": Qwen2Tokenizer, "clip": CLIPTokenizer, "t5": AutoTokenizer}
    return {name: cls.from_pretrained(folder / name, local_files_only=True) for name, cls in classes.items()}


def materialise(root: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Give meta parameters memory on the device, ties kept, and move buffers there; frozen and in eval mode."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    root.eval()
