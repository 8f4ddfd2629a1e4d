"""Reads LoRA factors of the DiT from safetensors files, whatever the names that their trainer gave them.

Known are names of diffusers' `FluxTransformer2DModel` (as diffusers, peft and `uniworld export` write them), names of
ours with q, k and v fused, and names of black-forest-labs/flux (kohya's `lora_unet_double_blocks_0_img_attn_qkv`, or
with dots). Each factor lands on the rows of our linears that it was trained for.

Letters: r rank.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uniworld.checkpoint.locate import HUB_ID, read_json, resolve_folder
from uniworld.checkpoint.names import diffusers_names, split_diffusers
from uniworld.checkpoint.weights import listed, open_weights

CONFIG_FILE = "adapter_config.json"  # beside the factors in a folder of peft
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "lora.safetensors")
METADATA = "lora_adapter_metadata"  # what diffusers writes into the file's header: peft's config as JSON
PREFIXES = ("base_model.model.", "denoiser.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
FACTOR_KEY = re.compile(r"^(.+)\.lora_(A|B|down|up)(?:\.\w+)?\.weight$")
ALPHA_KEY = re.compile(r"^(.+)\.alpha$")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Names of black-forest-labs/flux -> diffusers' names, whose rows they join in this order.
BFL_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
BFL_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
BFL_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
BFL_OUTPUT_MODULATION = "final_layer.adaLN_modulation.1"  # (shift, scale); diffusers' and ours are (scale, shift)


class Rows(NamedTuple):
    """Rows start..stop of the weight of a linear of ours."""

    linear: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Factor:
    """What one pair of factors adds to some rows of a linear: `scaling * b @ a`."""

    rows: Rows
    a: Tensor  # [r, in]
    b: Tensor  # [stop - start, r]
    scaling: float


def read_lora(source: str | Path, linears: Mapping[str, tuple[int, int]]) -> list[Factor]:
    """The factors of a LoRA file, in the precision of the file, on the CPU.

    Args:
        source: a .safetensors file, a folder with one, or a Hub id (`owner/name` or `owner/name/file.safetensors`).
        linears: (out, in) features of every linear of the DiT, by its name in `FluxTransformer`.

    Raises:
        ValueError: keys that name no linear of this DiT, a factor without its partner, ranks or shapes that do not
            fit, values that are not finite; all that is wrong of a kind in one line.
        FileNotFoundError: there is no such file, folder or repository.
    """
    path = find_file(source)
    with open_weights(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata() or {}
    return factors_of(path, tensors, _config_of(path, metadata), linears)


def find_file(source: str | Path) -> Path:
    """The safetensors file of a path or Hub id, fetched first where it lies on the Hub."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"lora={source}: must be a .safetensors file; pickled ones can run code and are not read")
        return path
    repository, _, name = str(source).rpartition("/")
    if name.endswith(".safetensors"):
        if not HUB_ID.match(repository):
            raise FileNotFoundError(f"lora={source}: no such file")
        folder = resolve_folder("lora", repository, (name, CONFIG_FILE))
        if not (folder / name).is_file():
            raise FileNotFoundError(f"lora={source}: {repository} has no {name}")
        return folder / name
    folder = resolve_folder("lora", source, (*FILES, CONFIG_FILE))
    known = [folder / name for name in FILES if (folder / name).is_file()]
    found = known[:1] or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = f"several files, name one of {', '.join(p.name for p in found)}" if found else f"none of {', '.join(FILES)}"
    raise FileNotFoundError(f"lora={source}: has {names}")


def factors_of(
    path: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], linears: Mapping[str, tuple[int, int]]
) -> list[Factor]:
    """As `read_lora`, of tensors that are read already; `config` is peft's, {} where there is none."""
    pairs, alphas, unknown = _sorted_keys(tensors)
    places = known_names(linears)
    flat = {stem: _flat(stem) for stem in (*pairs, *alphas)}
    unknown += [key for stem in pairs for key in pairs[stem].values() if flat[stem] not in places]
    unknown += [key for stem, key in alphas.items() if stem not in pairs]
    if unknown:
        none = "none of its keys" if len(unknown) == len(tensors) else f"{len(unknown)} of {len(tensors)} keys do not"
        raise ValueError(f"lora={path}: {none} belong to a LoRA of this DiT: {listed(sorted(unknown))}")
    if not pairs:
        raise ValueError(f"lora={path}: holds no factors (keys that end in .lora_A.weight and .lora_B.weight)")
    if problems := [p for stem in pairs for p in _problems(tensors, pairs[stem], places[flat[stem]], linears)]:
        raise ValueError(f"lora={path}: does not fit this DiT, made for another base? {listed(problems)}")
    factors = []
    for stem, keys in pairs.items():
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        alpha = float(tensors[alphas[stem]]) if stem in alphas else None
        scaling, start = scaling_of(stem, a.shape[0], alpha, config), 0
        for rows in places[flat[stem]]:
            stop = start + rows.stop - rows.start
            factors.append(Factor(rows, a, b[start:stop], scaling))
            start = stop
    return factors


def scaling_of(stem: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    """What the product of a pair is multiplied by: alpha / rank, alpha from the file or peft's config, else 1."""
    if alpha is None and "lora_alpha" in config:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", stem):
                alpha = value
                break
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def known_names(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Rows, ...]]:
    """Every name under which a LoRA file may speak of rows of the DiT's linears; dots are written as underscores."""
    names: dict[str, tuple[Rows, ...]] = {}
    for linear, (out, _) in linears.items():
        names[linear] = (Rows(linear, 0, out),)
        sources = diffusers_names(f"{linear}.weight")
        if len(sources) > 1:
            names |= {source.removesuffix(".weight"): (_rows(source, linears),) for source in sources}
    names |= _bfl_names(linears)
    return {name.replace(".", "_"): rows for name, rows in names.items()}


def _rows(source: str, linears: Mapping[str, tuple[int, int]]) -> Rows:
    """The rows of the linear whose weight diffusers calls `source`."""
    place = split_diffusers(source)
    linear = place.name.removesuffix(".weight")
    size = linears[linear][0] // place.rows
    return Rows(linear, place.row * size, (place.row + 1) * size)


def _bfl_names(linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Rows, ...]]:
    names = {}
    double = ("transformer_blocks", "double_blocks", BFL_DOUBLE)
    for theirs, bfl, table in (double, ("single_transformer_blocks", "single_blocks", BFL_SINGLE)):
        for index in sorted({name.split(".")[1] for name in linears if name.startswith(f"{theirs}.")}):
            for name, sources in table.items():
                joined = (_rows(f"{theirs}.{index}.{source}.weight", linears) for source in sources)
                names[f"{bfl}.{index}.{name}"] = tuple(joined)
    names |= {name: (_rows(f"{source}.weight", linears),) for name, source in BFL_OTHERS.items() if source in linears}
    half = linears["norm_out.linear"][0] // 2
    names[BFL_OUTPUT_MODULATION] = (Rows("norm_out.linear", half, 2 * half), Rows("norm_out.linear", 0, half))
    return names


def _flat(stem: str) -> str:
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem.replace(".", "_")


def _sorted_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """({name: {"A": key, "B": key}}, {name: key of its alpha}, keys that are neither)."""
    pairs: dict[str, dict[str, str]] = {}
    alphas, unknown = {}, []
    for key in tensors:
        if match := FACTOR_KEY.match(key):
            side = {"down": "A", "up": "B"}.get(match[2], match[2])
            pairs.setdefault(match[1], {})[side] = key
        elif (match := ALPHA_KEY.match(key)) and tensors[key].numel() == 1:
            alphas[match[1]] = key
        else:
            unknown.append(key)
    return pairs, alphas, unknown


def _problems(
    tensors: Mapping[str, Tensor],
    keys: dict[str, str],
    places: tuple[Rows, ...],
    linears: Mapping[str, tuple[int, int]],
) -> list[str]:
    """What is wrong with one pair of factors."""
    if len(keys) < 2:
        return [f"{next(iter(keys.values()))} has no partner"]
    a, b = tensors[keys["A"]], tensors[keys["B"]]
    num_in, num_out = linears[places[0].linear][1], sum(rows.stop - rows.start for rows in places)
    problems = []
    if a.ndim != 2 or a.shape[1] != num_in:
        problems.append(f"shape {list(a.shape)} of {keys['A']} (must be [rank, {num_in}])")
    elif b.shape != (num_out, a.shape[0]):
        problems.append(f"shape {list(b.shape)} of {keys['B']} (must be {[num_out, a.shape[0]]}, rank {a.shape[0]})")
    for key, tensor in ((keys["A"], a), (keys["B"], b)):
        if tensor.dtype not in DTYPES:
            problems.append(f"dtype {tensor.dtype} of {key}")
        elif not tensor.isfinite().all():
            problems.append(f"values of {key} that are not finite")
    return problems


def _config_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's config of these factors, from the file's header or beside the file; {} where there is none."""
    config: dict[str, Any] = {}
    if METADATA in metadata:
        try:
            packed = json.loads(metadata[METADATA])
        except json.JSONDecodeError as error:
            raise ValueError(f"lora={path}: its {METADATA} is not valid JSON ({error})") from None
        config = {key.removeprefix("transformer."): value for key, value in packed.items()}
    elif path.name == FILES[0] and (path.parent / CONFIG_FILE).is_file():
        config = read_json(path.parent / CONFIG_FILE)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config["peft_type"]
        raise ValueError(f"lora={path}: is a {kind} adapter, only plain LoRA factors are read")
    return config
