"""The default model `tiny`: the whole pipeline at a size that runs anywhere.

Trained weights, where this package ships them, stand in `PACKAGED`; otherwise a checkpoint with random weights is made
on first use in the user's cache. It is a complete checkpoint folder: authors' layout, with `flux/` and `siglip/` in it.
"""

import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import uniworld
from uniworld.checkpoint import tiny_configs
from uniworld.checkpoint.build import build_univa, checkpoint_module
from uniworld.checkpoint.convert import fresh_connector_shapes, univa_config
from uniworld.checkpoint.names import authors_names
from uniworld.checkpoint.save import TASK_HEAD_FILE, ShardWriter, atomic_folder, save_module, with_prefix, write_json
from uniworld.checkpoint.tiny_tokenizers import write_clip_tokenizer, write_qwen_tokenizer, write_t5_tokenizer
from uniworld.checkpoint.weights import parameters_on_meta

PACKAGED = Path(uniworld.__file__).parent / "weights" / "tiny"
RANDOM_VERSION = 1  # part of the cache folder's name: raise it whenever what is written changes
SEED = 20250603
STORED_DTYPE = torch.bfloat16


def cache_root() -> Path:
    """UNIWORLD_CACHE, else XDG_CACHE_HOME/uniworld, else ~/.cache/uniworld."""
    if chosen := os.environ.get("UNIWORLD_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "uniworld"


def tiny_dir() -> Path:
    """The folder of the model `tiny`, made first where it is not there yet.

    Raises:
        ValueError: the cache cannot be written to.
    """
    return PACKAGED if (PACKAGED / "config.json").is_file() else random_tiny_dir()


def random_tiny_dir() -> Path:
    """The folder of a `tiny` with random weights, made first where it is not there yet. Raises: as `tiny_dir`."""
    folder = cache_root() / f"tiny-random-v{RANDOM_VERSION}"
    if not (folder / "config.json").is_file():
        with atomic_folder(folder, keep_existing=True) as temporary:
            write_random_tiny(temporary)
    return folder


def write_random_tiny(folder: Path) -> None:
    """Write the whole checkpoint with random weights, the same bits every time."""
    _write_univa(folder)
    flux = folder / "flux"
    write_json(_made(flux) / "model_index.json", tiny_configs.MODEL_INDEX)
    write_json(_made(flux / "scheduler") / "scheduler_config.json", tiny_configs.SCHEDULER)
    clip = tiny_configs.clip_config(write_clip_tokenizer(flux / "tokenizer"))
    t5 = tiny_configs.t5_config(write_t5_tokenizer(flux / "tokenizer_2"))
    with parameters_on_meta():
        modules = _encoders(clip, t5)
    _write_module(flux / "text_encoder", clip, modules["clip"], prefix="text_model.")
    _write_module(flux / "text_encoder_2", t5, modules["t5"])
    _write_module(flux / "vae", tiny_configs.VAE, modules["vae"], stem="diffusion_pytorch_model")
    siglip = folder / "siglip"
    _write_module(siglip, tiny_configs.SIGLIP, modules["siglip"], prefix="vision_model.")
    write_json(siglip / "preprocessor_config.json", tiny_configs.SIGLIP_PREPROCESSOR)


def _encoders(clip: dict[str, Any], t5: dict[str, Any]) -> dict[str, nn.Module]:
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        SiglipVisionConfig,
        SiglipVisionModel,
        T5Config,
        T5EncoderModel,
    )

    return {
        "clip": CLIPTextModel(CLIPTextConfig.from_dict(clip)),
        "t5": T5EncoderModel(T5Config.from_dict(t5)),
        "vae": AutoencoderKL.from_config(tiny_configs.VAE),
        "siglip": SiglipVisionModel(SiglipVisionConfig.from_dict(tiny_configs.SIGLIP)),
    }


def _write_univa(folder: Path) -> None:
    """VLM, denoiser, connectors, task head, tokenizer and processor of the checkpoint itself."""
    ids = write_qwen_tokenizer(folder)
    config = univa_config(tiny_configs.qwen_config(ids), tiny_configs.DENOISER, ids)
    config["uniworld"] = {"anchor_px": tiny_configs.ANCHOR_PX, "random_weights": True}
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", tiny_configs.PREPROCESSOR)

    connectors = fresh_connector_shapes(config, tiny_configs.SIGLIP_HIDDEN)
    writer = ShardWriter(folder)
    for part, module in build_univa(config, connectors).items():
        for name, parameter in checkpoint_module(part, module).named_parameters():
            keys = authors_names(part, name)
            shape = (parameter.shape[0] // len(keys), *parameter.shape[1:])
            for key in keys:
                writer.add(key, initial(key, shape))
    writer.finish()

    D, hidden = tiny_configs.HIDDEN, tiny_configs.TASK_HEAD_HIDDEN
    shapes = {"0.weight": (hidden, D), "0.bias": (hidden,), "3.weight": (2, hidden), "3.bias": (2,)}
    torch.save({name: initial(f"task_head.{name}", shape) for name, shape in shapes.items()}, folder / TASK_HEAD_FILE)


def _write_module(
    folder: Path, config: dict[str, Any], module: nn.Module, *, prefix: str = "", stem: str = "model"
) -> None:
    """One encoder's folder; `prefix` (transformers 4) stands before names that do not have it already."""
    shapes = ((with_prefix(name, prefix), parameter.shape) for name, parameter in module.named_parameters())
    save_module(folder, ((key, initial(f"{folder.name}/{key}", shape)) for key, shape in shapes), config, stem)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def initial(key: str, shape: tuple[int, ...]) -> Tensor:
    """The random start of one tensor, drawn from a seed of its own.

    Norm scales are one and biases zero; a matrix has the variance that keeps activations at their size, a table of
    embeddings a standard deviation of one, and adaLN linears a smaller one, so that modulation stays below one.
    """
    if len(shape) == 1:
        return (torch.ones if key.endswith("weight") else torch.zeros)(shape, dtype=STORED_DTYPE)
    std = 1 / math.sqrt(math.prod(shape[1:]))
    if any(table in key for table in ("embed_tokens", "shared", "token_embedding", "position_embedding")):
        std = 1.0
    elif any(f"{norm}.linear" in key for norm in ("norm", "norm1", "norm1_context", "norm_out")):
        std *= 0.5
    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(key.encode()))
    return (std * torch.randn(shape, generator=generator)).to(STORED_DTYPE)
