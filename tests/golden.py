"""Reads the golden data in `tests/data/golden`: cases of the authors' code, and complete checkpoint folders.

    from golden import cases, close, resolve, univa_dir
    for case in cases("b_denoise_embeds"):
        inputs, outputs = resolve(case)                     # nested dicts and lists of torch tensors
        ok, worst = close(mine, outputs["prompt_embeds"], mask=outputs["valid_mask"])

`UNIWORLD_GOLDEN` may name a folder with the complete golden data; tests that need its pictures run only then.
"""

import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent / "data" / "golden"
COMPLETE = os.environ.get("UNIWORLD_GOLDEN")

SIGLIP_SEED = 4001
SIGLIP_LAYER = (  # the order in which the weights of a layer were drawn
    *(f"self_attn.{name}_proj.{kind}" for name in ("k", "v", "q", "out") for kind in ("weight", "bias")),
    *(f"{name}.{kind}" for name in ("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2") for kind in ("weight", "bias")),
)


@functools.cache
def cases(section: str) -> list[dict]:
    return json.loads((ROOT / "cases" / f"{section}.json").read_text())


def case(section: str, name: str) -> dict:
    return next(c for c in cases(section) if c["name"] == name)


@functools.cache
def tensors() -> dict[str, Tensor]:
    return load_file(ROOT / "tensors.safetensors")


def resolve(case: dict) -> tuple[dict, dict]:
    """(inputs, outputs) of a case, every tensor a fresh copy."""
    return _resolve(case["inputs"]), _resolve(case["outputs"])


def _resolve(x: Any) -> Any:
    if isinstance(x, dict):
        if "tensor" not in x:
            return {k: _resolve(v) for k, v in x.items()}
        stored = tensors()[x["tensor"]]
        return tensors()[x["rows"]][stored.long()] if "rows" in x else stored.clone()
    return [_resolve(v) for v in x] if isinstance(x, list) else x


def close(a, b, atol: float = 1e-4, rtol: float = 0.0, mask: Tensor | None = None) -> tuple[bool, float | str]:
    """Whether |a - b| <= atol + rtol |b| everywhere, and the largest |a - b|.

    `mask` [B, L] restricts the comparison to the entries of the first two dimensions where it is set.
    """
    a, b = torch.as_tensor(a).detach().double().cpu(), torch.as_tensor(b).detach().double().cpu()
    if a.shape != b.shape:
        return False, f"shape {tuple(a.shape)} vs {tuple(b.shape)}"
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    difference = (a - b).abs()
    return bool((difference <= atol + rtol * b.abs()).all()), float(difference.max()) if difference.numel() else 0.0


def special_token_ids() -> dict[str, int]:
    return json.loads((ROOT / "special_token_ids.json").read_text())


def checkpoint_keys() -> dict[str, tuple[int, ...]]:
    """Every key of the complete univa checkpoint and its shape."""
    rows = [line.split("\t") for line in (ROOT / "keys_small.txt").read_text().splitlines()]
    return {row[0]: tuple(json.loads(row[2])) for row in rows}


def _layout(tmp: Path, name: str, *sources: str) -> Path | None:
    """Copy the files of `sources` to `tmp/name`; None when it is there already."""
    if (Path(tmp) / name).exists():
        return None
    for source in sources:
        shutil.copytree(ROOT / source, Path(tmp) / name, dirs_exist_ok=True)
    return Path(tmp) / name


def _univa_weights() -> dict[str, Tensor]:
    return load_file(ROOT / "univa" / "model.safetensors")


def univa_dir(tmp: Path) -> Path:
    """The complete univa checkpoint folder, made once below `tmp`; `vae_projector` and the task head are random."""
    folder = _layout(tmp, "univa", "univa")
    if folder is None:
        return Path(tmp) / "univa"
    generator = torch.Generator().manual_seed(0)
    weights = _univa_weights()
    for key, shape in checkpoint_keys().items():
        if key not in weights:
            weights[key] = 0.05 * torch.randn(shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hidden_size = json.loads((folder / "config.json").read_text())["hidden_size"]
    shapes = {"0.weight": (10240, hidden_size), "0.bias": (10240,), "3.weight": (2, 10240), "3.bias": (2,)}
    head = {key: 0.05 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    torch.save(head, folder / "task_head_final.pt")
    return folder


def flux_dir(tmp: Path) -> Path:
    """The complete FLUX folder (transformer, VAE, CLIP, T5, tokenizers, scheduler), made once below `tmp`."""
    folder = _layout(tmp, "flux", "flux")
    if folder is None:
        return Path(tmp) / "flux"
    prefix = "denoise_tower.denoiser."
    weights = {k.removeprefix(prefix): v for k, v in _univa_weights().items() if k.startswith(prefix)}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def qwen_dir(tmp: Path) -> Path:
    """The VLM as a plain Qwen2.5-VL folder with the key names of transformers 4, made once below `tmp`."""
    folder = _layout(tmp, "qwen", "univa", "qwen")
    if folder is None:
        return Path(tmp) / "qwen"
    weights = {k: v for k, v in _univa_weights().items() if re.match(r"(visual|model|lm_head)\.", k)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def siglip_dir(tmp: Path) -> Path:
    """The SigLIP folder, made once below `tmp`."""
    folder = _layout(tmp, "siglip", "siglip")
    if folder is not None:
        save_file(siglip_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return Path(tmp) / "siglip"


def siglip_weights() -> dict[str, Tensor]:
    """The weights of the golden SigLIP, drawn from their seed, with the key names of transformers 4."""
    config = json.loads((ROOT / "siglip" / "config.json").read_text())
    D, M, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes = {
        "embeddings.patch_embedding.weight": (D, config["num_channels"], patch, patch),
        "embeddings.patch_embedding.bias": (D,),
        "embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2, D),
    }
    for layer in range(config["num_hidden_layers"]):
        for name in SIGLIP_LAYER:
            rows = M if "fc1" in name else D
            columns = M if "fc2" in name else D
            matrix = name.endswith("weight") and "norm" not in name
            shapes[f"encoder.layers.{layer}.{name}"] = (rows, columns) if matrix else (rows,)
    shapes |= {"post_layernorm.weight": (D,), "post_layernorm.bias": (D,)}

    generator = torch.Generator().manual_seed(SIGLIP_SEED)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            weights[name] = 0.05 * noise
        elif "position" in name:
            weights[name] = 0.5 * noise
        else:
            weights[name] = noise / noise[0].numel() ** 0.5
    return {f"vision_model.{name}": value for name, value in weights.items()}


def _patches_to_image(patches: Tensor, rows: int, columns: int) -> np.ndarray:
    """The picture [H, W, 3] uint8 that the VLM's patches of one image hold."""
    config = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())
    m, p, T = config["merge_size"], config["patch_size"], config["temporal_patch_size"]
    x = patches.view(rows // m, columns // m, m, m, 3, T, p, p)[:, :, :, :, :, 0]
    x = x.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * p, columns * p, 3).double()
    x = (x * torch.tensor(config["image_std"]) + torch.tensor(config["image_mean"])) * 255
    assert (x - x.round()).abs().max() < 1e-3
    return x.round().to(torch.uint8).numpy()


def images() -> list[Image.Image]:
    """The pictures A, B and C of the golden cases, read back from the VLM's unresized patches."""
    inputs, _ = resolve(case("s_encoders", "qwen_vision"))
    pictures, first = [], 0
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        patches = inputs["pixel_values"][first : first + rows * columns]
        pictures.append(Image.fromarray(_patches_to_image(patches, rows, columns)))
        first += rows * columns
    return pictures
