"""What precomputed states depend on, as short values that can be compared and named.

A weight file is not read as a whole: of every tensor count its name, dtype, shape and a sample of its bytes, so that
other weights of the same shapes are noticed and 20 GB are still checked in seconds.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uniworld.checkpoint import locate
from uniworld.checkpoint.load import TINY
from uniworld.checkpoint.names import TOWER_PREFIX
from uniworld.checkpoint.tiny import tiny_dir
from uniworld.config import TrainConfig
from uniworld.train.stages import inserts_siglip

FORMAT = 1  # of the cache: raise it whenever what is stored changes
SAMPLED_BYTES = 1024  # at the beginning, in the middle and at the end of each tensor
DATA_FIELDS = ("anchor_px", "num_ratios", "target_fit", "vlm_max_px", "region_weight", "keep_scattered", "focus_weight")
# What a cache may hold beyond what a run needs.
SURPLUS = ("siglip states", "T5 states", "states without prompts")


def settings_fingerprint(config: TrainConfig) -> dict[str, Any]:
    """The settings that change what is stored."""
    data = {f"data.{name}": getattr(config.data, name) for name in DATA_FIELDS}
    return {
        "format": FORMAT,
        **data,
        "sharding.dtype": config.sharding.dtype,
        "siglip states": inserts_siglip(config.stage),
        "T5 states": config.model.use_t5,
        "states without prompts": config.data.drop_prompt_rate > 0,
    }


def encoder_fingerprint(config: TrainConfig) -> dict[str, str]:
    """One hash for each frozen encoder that the config uses and whose files lie on this machine."""
    model = local_folder(config.model.path)
    flux, siglip = (
        local_folder(chosen) if chosen is not None else None if model is None else model / name
        for name, chosen in (("flux", config.model.flux), ("siglip", config.model.siglip))
    )
    found = {}
    if model is not None:
        own = {
            k: v for k, v in locate.read_json(model / "config.json").items() if k not in ("denoise_tower", "uniworld")
        }
        found["VLM"] = _digest(
            weights_digest(locate.weight_files(model), leave_out=TOWER_PREFIX),
            json.dumps(own, sort_keys=True),
            *_texts(model, ("preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt")),
        )
    if flux is not None and (flux / "vae").is_dir():
        found["VAE"] = _folder_digest(flux / "vae", "diffusion_pytorch_model")
        found["CLIP"] = _folder_digest(flux / "text_encoder", tokenizer=flux / "tokenizer")
        if config.model.use_t5:
            found["T5"] = _folder_digest(flux / "text_encoder_2", tokenizer=flux / "tokenizer_2")
    if siglip is not None and siglip.is_dir() and inserts_siglip(config.stage):
        found["SigLIP"] = _folder_digest(siglip)
    return found


def local_folder(path: str) -> Path | None:
    """The folder of a checkpoint if it is on this machine, fetched earlier or given; nothing is downloaded."""
    if path == TINY:
        return tiny_dir()
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if not locate.HUB_ID.match(path):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (OSError, ValueError):
        return None


def weights_digest(files: Iterable[Path], leave_out: str | None = None) -> str:
    """Hash of the tensors in safetensors files, but for those whose names start with `leave_out`."""
    tensors = []
    for path in files:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for key, entry in header.items():
                if key == "__metadata__" or (leave_out and key.startswith(leave_out)):
                    continue
                first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
                sample = hashlib.sha256()
                for place in sorted({first, (first + last) // 2, max(first, last - SAMPLED_BYTES)}):
                    file.seek(place)
                    sample.update(file.read(min(SAMPLED_BYTES, last - place)))
                tensors.append(f"{key} {entry['dtype']} {entry['shape']} {sample.hexdigest()}")
    return _digest(*sorted(tensors))


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What makes a cache unfit for `wanted`, in words; parts that either side does not know do not count."""
    found = []
    for name, value in wanted.items():
        if name not in cached:
            continue
        have = cached[name]
        if have == value or (name in SURPLUS and have):
            continue
        if name in SURPLUS:
            found.append(f"it holds no {name}")
        elif isinstance(value, str) and len(value) == 32:
            found.append(f"{name} is another")
        else:
            found.append(f"{name} is {value}, was {have}")
    return found


def _folder_digest(folder: Path, stem: str = "model", tokenizer: Path | None = None) -> str:
    texts = list(_texts(folder, ("config.json", "preprocessor_config.json")))
    if tokenizer is not None:
        texts += _texts(tokenizer, sorted(path.name for path in tokenizer.iterdir() if path.is_file()))
    return _digest(weights_digest(locate.weight_files(folder, stem)), *texts)


def _texts(folder: Path, names: Iterable[str]) -> Iterable[str]:
    """Hashes of those of the files that exist."""
    for name in names:
        path = folder / name
        if path.is_file():
            yield f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
