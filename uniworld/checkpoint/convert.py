"""Makes a starting checkpoint in the authors' layout from Qwen2.5-VL and FLUX.1-dev, shard by shard."""

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniworld.checkpoint.build import ConnectorShape, build_univa, read_config, univa_plan
from uniworld.checkpoint.connector_files import read_connectors
from uniworld.checkpoint.locate import (
    FLUX_DENOISER_PATTERNS,
    MODEL_PATTERNS,
    SIGLIP_PATTERNS,
    read_json,
    resolve_folder,
    weight_files,
)
from uniworld.checkpoint.names import CONNECTORS, DENOISER_PREFIX, TOWER_PREFIX, qwen_to_authors
from uniworld.checkpoint.progress import byte_progress
from uniworld.checkpoint.save import MAX_SHARD_BYTES, ShardWriter, atomic_folder, copy_side_files, write_json
from uniworld.checkpoint.weights import Header, open_weights, read_headers

SIGLIP2_HIDDEN = 1152  # SigLIP2 so400m, when no SigLIP folder is given
TOKEN_FIELDS = {
    "image_begin_token_id": "<|vision_start|>",
    "image_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
TORCH_DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(
    qwen: str | Path,
    flux: str | Path,
    out: str | Path,
    *,
    siglip: str | Path | None = None,
    connectors: str | Path | None = None,
    connector_hidden: int | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write a starting checkpoint: VLM from Qwen2.5-VL, denoiser from FLUX.1-dev, connectors freshly drawn.

    Weights keep the dtype they have. At most one shard is in memory.

    Args:
        qwen: Qwen2.5-VL folder or Hub id.
        flux: FLUX.1-dev folder or Hub id (its `transformer/`).
        out: the folder to make; it appears only when it is complete.
        siglip: SigLIP folder or Hub id, whose width the SigLIP connector takes; 1152 (so400m) without one.
        connectors: folder with `denoise_projector.bin` or `siglip_projector.bin`, to take in place of fresh ones.
        connector_hidden: width inside the connectors; three times the DiT's text width (12288) by default.
        seed: of the connectors' initial weights.
        max_shard_bytes: size limit of the files written.
        overwrite: replace `out` where it exists.
        progress: draw a progress bar on stderr.

    Raises:
        FileNotFoundError: a folder or a shard is missing.
        ValueError: weights and configs do not fit, or `out` exists or cannot be written.
    """
    qwen_folder = resolve_folder("qwen", qwen, MODEL_PATTERNS)
    flux_folder = resolve_folder("flux", flux, FLUX_DENOISER_PATTERNS)
    given = {} if connectors is None else read_connectors(Path(connectors))
    with atomic_folder(Path(out), overwrite=overwrite) as temporary:
        ids = special_token_ids(qwen_folder)
        denoiser_config = read_config(flux_folder / "transformer")
        config = univa_config(flat_qwen_config(read_config(qwen_folder)), denoiser_config, ids)
        shapes = fresh_connector_shapes(config, siglip_width(siglip), connector_hidden)
        sources = _sources(qwen_folder, flux_folder / "transformer")
        _check(sources, config, f"{qwen_folder} with {flux_folder}")

        writer = ShardWriter(temporary, max_shard_bytes)
        num_bytes = sum(header.num_bytes for header in sources.values())
        with byte_progress(f"Writing {out}", num_bytes, progress) as advance:
            for key, tensor in _read(sources):
                writer.add(key, tensor)
                advance(tensor.nbytes)
        dtype = TORCH_DTYPE[next(h.dtype for key, h in sources.items() if key.startswith(DENOISER_PREFIX))]
        for key, fresh in fresh_connectors(shapes, seed):
            tensor = given.get(key, fresh)
            if tensor.shape != fresh.shape:
                raise ValueError(f"connectors={connectors}: {key} is {list(tensor.shape)}, must be {list(fresh.shape)}")
            writer.add(key, tensor.to(dtype))
        writer.finish()
        copy_side_files(qwen_folder, temporary)
        write_json(temporary / "config.json", config)
    return Path(out)


def _sources(qwen: Path, transformer: Path) -> dict[str, Header]:
    """Headers of the VLM's and the denoiser's tensors, by their key in the authors' layout."""
    vlm = {qwen_to_authors(key): header for key, header in read_headers(weight_files(qwen)).items()}
    stem = "diffusion_pytorch_model"
    denoiser = {DENOISER_PREFIX + key: h for key, h in read_headers(weight_files(transformer, stem)).items()}
    return vlm | denoiser


def _check(sources: dict[str, Header], config: dict[str, Any], title: str) -> None:
    """Refuse weights that do not fit the configs, before anything is copied."""
    univa_plan(title, sources, build_univa(config, {}), torch.device("cpu"), torch.bfloat16).check()


def _read(sources: dict[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, file by file in the order of `sources`."""
    by_file: dict[Path, list[tuple[str, Header]]] = {}
    for key, header in sources.items():
        by_file.setdefault(header.path, []).append((key, header))
    for path, entries in by_file.items():
        with open_weights(path) as file:
            for key, header in entries:
                yield key, file.get_tensor(header.key)


def special_token_ids(folder: Path) -> dict[str, int]:
    """The ids of the tokens that the config names, from the tokenizer.

    Raises:
        ValueError: the tokenizer does not know one of them.
    """
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    known = tokenizer.get_vocab()
    missing = [token for token in sorted(set(TOKEN_FIELDS.values())) if token not in known]
    if missing:
        raise ValueError(f"{folder}: the tokenizer has no {', '.join(missing)}")
    return {token: known[token] for token in TOKEN_FIELDS.values()}


def flat_qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-VL's config with the text model's fields at the top, where transformers 4 and the authors have them."""
    nested = {k: v for k, v in config.get("text_config", {}).items() if k != "model_type"}
    flat = {**nested, **{k: v for k, v in config.items() if k != "text_config"}}
    if "rope_parameters" in flat:  # the name of transformers 5
        rope = dict(flat.pop("rope_parameters"))
        flat["rope_theta"] = rope.pop("rope_theta", flat.get("rope_theta", 1000000.0))
        flat["rope_scaling"] = {**rope, "type": rope.get("rope_type", "default")}
    return flat


def univa_config(qwen: dict[str, Any], denoiser: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """The config.json of a UniWorld checkpoint, as the authors write it, with every token id filled in.

    Args:
        qwen: the VLM's flat config; denoiser: diffusers' transformer config; ids: of the special tokens.
    """
    text_width = denoiser["joint_attention_dim"]
    tower = {
        "model_type": "univa_denoise_tower",
        "denoiser_type": "flux",
        "denoiser_config": dict(denoiser),
        "denoise_projector_type": "mlp2x_gelu",  # the authors' name; the activation is SiLU
        "vae_projector_type": "mlp2x_gelu",
        "input_hidden_size": qwen["hidden_size"],
        "vae_input_hidden_size": denoiser["in_channels"],
        "output_hidden_size": text_width,
    }
    return {
        **qwen,
        **{field: ids[token] for field, token in TOKEN_FIELDS.items()},
        "architectures": ["UnivaQwen2p5VLForConditionalGeneration"],
        "model_type": "univa_qwen2p5vl",
        "denoise_tower": tower,
        "image_token_length": None,
        "shortcut_image_embeds": False,
        "shortcut_image_embeds_scale": 0.5,
        "shortcut_projector_type": None,
    }


def siglip_width(siglip: str | Path | None) -> int:
    if siglip is None:
        return SIGLIP2_HIDDEN
    config = read_json(resolve_folder("siglip", siglip, SIGLIP_PATTERNS) / "config.json")
    return config.get("vision_config", config)["hidden_size"]


def fresh_connector_shapes(
    config: dict[str, Any], siglip_hidden: int, connector_hidden: int | None = None
) -> dict[str, ConnectorShape]:
    """(in, hidden, out) of new connectors: hidden is 3x the text width, for the VAE connector the DiT's width."""
    denoiser = config["denoise_tower"]["denoiser_config"]
    out = denoiser["joint_attention_dim"]
    hidden = connector_hidden or 3 * out
    dit_width = denoiser["num_attention_heads"] * denoiser["attention_head_dim"]
    return {
        "denoise_projector": (config["hidden_size"], hidden, out),
        "siglip_projector": (siglip_hidden, hidden, out),
        "vae_projector": (denoiser["in_channels"], dit_width, out),
    }


def fresh_connectors(shapes: dict[str, ConnectorShape], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial weights as `nn.Linear` draws them: uniform within 1 / sqrt(in features), fp32, one seed a tensor."""
    for part in CONNECTORS:
        in_features, hidden, out = shapes[part]
        for layer, rows, columns in ((0, hidden, in_features), (2, out, hidden)):
            bound = 1 / math.sqrt(columns)
            for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
                key = f"{TOWER_PREFIX}{part}.{layer}.{kind}"
                generator = torch.Generator().manual_seed(seed ^ zlib.crc32(key.encode()))
                yield key, torch.empty(shape).uniform_(-bound, bound, generator=generator)
