"""Finds checkpoint folders (local or on the Hub) and the weight files in them."""

import json
import re
from pathlib import Path

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

# What to fetch of a Hub repository. `*` of these patterns also matches "/".
MODEL_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors", "task_head_final.pt")
SIGLIP_PATTERNS = ("*.json", "*.safetensors")
FLUX_PATTERNS = ("model_index.json", "scheduler/*", "vae/*", "text_encoder/*", "tokenizer/*")
FLUX_T5_PATTERNS = ("text_encoder_2/*", "tokenizer_2/*")
FLUX_DENOISER_PATTERNS = ("transformer/*",)


def resolve_folder(field: str, value: str | Path, patterns: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, downloaded first where `value` is a Hub id.

    Args:
        field: what the user calls it, for errors (`model`, `flux`, `siglip`).
        value: an existing folder or "owner/name" on the Hub.
        patterns: the files to fetch from the Hub.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be fetched.
    """
    folder = Path(value).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{field}={value}: is a file, must be a folder or a Hub id")
    if not HUB_ID.match(str(value)):
        raise FileNotFoundError(f"{field}={value}: no such folder")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(value), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # every error of the Hub client is one of the two
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{field}={value}: no such folder, and not fetched from the Hub: {reason}") from error


def resolve_part(field: str, value: str | Path | None, model: Path, patterns: tuple[str, ...], example: str) -> Path:
    """The folder of FLUX or SigLIP: what was asked for, else the subfolder of that name beside the weights."""
    if value is not None:
        return resolve_folder(field, value, patterns)
    beside = model / field
    if not beside.is_dir():
        raise FileNotFoundError(f"{field}=None: {model} has no {field}/ folder; pass {field}={example} or a local copy")
    return beside


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of a folder, `<stem>.safetensors` or the shards that its index names.

    Raises:
        FileNotFoundError: no weights, or a shard of the index is missing (named).
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        raise FileNotFoundError(f"{folder}: has neither {single.name} nor {index.name}")
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{folder}: missing shard {missing[0]}{more} of {len(shards)}")
    if not shards:
        raise ValueError(f"{index}: names no shards")
    return [folder / name for name in shards]


def read_json(path: Path) -> dict:
    """A JSON file, with an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
