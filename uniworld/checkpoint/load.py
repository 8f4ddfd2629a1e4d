"""Loads a whole model: a UniWorld checkpoint with the FLUX.1-dev and SigLIP folders that it needs.

Everything is found and checked from configs and file headers first, so that a mistake is reported before any weight
is read. Then every tensor goes from the mapped file straight to its device and dtype.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uniworld.checkpoint import locate
from uniworld.checkpoint.build import (
    build_tower,
    build_univa,
    denoiser_config,
    encoder_plan,
    read_config,
    tower_shapes,
    univa_plan,
)
from uniworld.checkpoint.connector_files import override_connectors
from uniworld.checkpoint.names import CONNECTORS, TOWER_PREFIX
from uniworld.checkpoint.precision import checked_dtype, default_device, default_dtype, vae_dtype
from uniworld.checkpoint.progress import byte_progress
from uniworld.checkpoint.save import TASK_HEAD_FILE
from uniworld.checkpoint.tiny import tiny_dir
from uniworld.checkpoint.weights import Plan, fill, filling, parameters_on_meta, read_headers
from uniworld.checkpoint.widths import check_widths
from uniworld.models.connectors import Connector
from uniworld.models.flux import FluxTransformer
from uniworld.models.known_world import KnownWorld
from uniworld.models.prompts import VISION_END, VISION_START, PromptProcessor
from uniworld.models.queries import LearnedQueries
from uniworld.models.references import REFERENCES
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.task_head import TaskHead
from uniworld.models.text_encoders import TextEncoders
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.unified import FULL_ANCHOR_PX, MAX_GUIDANCE, MAX_STEPS, TimeShift, UniWorld
from uniworld.models.vae import ImageAutoencoder
from uniworld.models.vision_processor import VisionProcessor

TINY = "tiny"
FLUX_EXAMPLE = "black-forest-labs/FLUX.1-dev"
SIGLIP_EXAMPLE = "google/siglip2-so400m-patch16-512"
UNUSED_SIGLIP_KEYS = ("text_model.", "logit_scale", "logit_bias", "vision_model.head.")


@dataclass(frozen=True)
class Folders:
    """Where the parts lie."""

    model: Path
    flux: Path
    siglip: Path
    t5: bool


@dataclass(frozen=True, kw_only=True)
class DenoiserParts:
    """What training on precomputed states needs: no encoder, tokenizer or VAE."""

    folder: Path
    denoiser: FluxTransformer
    denoise_projector: Connector
    siglip_projector: Connector
    queries: LearnedQueries | None = None
    device: torch.device
    dtype: torch.dtype


def load_denoiser(
    model: str | Path = TINY,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    connectors: str | Path | None = None,
) -> DenoiserParts:
    """Load the DiT and its connectors alone; arguments and errors as for `load_uniworld`."""
    device = default_device() if device is None else torch.device(device)
    dtype = checked_dtype(dtype or default_dtype(device, tiny=str(model) == TINY))
    folder = model_folder(model)
    config = read_config(folder)
    denoiser_config(config, folder)
    headers = {k: h for k, h in read_headers(locate.weight_files(folder)).items() if k.startswith(TOWER_PREFIX)}
    parts = build_tower(config, tower_shapes(headers, str(folder)))
    plan = univa_plan(folder, headers, parts, device, dtype)
    plan.check()
    with byte_progress(f"Loading the DiT of {model}", plan.num_bytes, progress) as advance:
        fill([plan], advance=advance)
    for part in parts.values():
        part.eval()
    if connectors is not None:
        override_connectors({name: parts[name] for name in CONNECTORS if name in parts}, Path(connectors))
    parts.pop("vae_projector", None)
    return DenoiserParts(folder=folder, **parts, device=device, dtype=dtype)


def load_uniworld(
    model: str | Path = TINY,
    flux: str | Path | None = None,
    siglip: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    check_finite: bool = False,
    use_t5: bool | None = None,
    connectors: str | Path | None = None,
    in_host: Collection[str] | Callable[[UniWorld], Collection[str]] = (),
    meanwhile: Callable[[UniWorld], None] | None = None,
) -> UniWorld:
    """Load every part; parameters are frozen and modules in eval mode.

    Host memory peaks at most one shard above what stays there.

    Args:
        model: "tiny", or a Hub id or folder in the authors' layout.
        flux: FLUX.1-dev, Hub id or folder: VAE, text encoders, tokenizers, scheduler config; by default the folder
            `flux/` inside the model's.
        siglip: SigLIP, Hub id or folder; by default `siglip/` inside the model's.
        device: a GPU where there is one, else the CPU.
        dtype: or its name; by default bf16 on a GPU and on CPUs with native bf16, else fp32; `tiny` is fp32 on every
            CPU. The VAE takes it on a GPU and fp32 on a CPU.
        progress: draw a progress bar on stderr.
        check_finite: refuse NaN and infinities, naming the tensor.
        use_t5: None loads T5 where the FLUX folder holds it, unless `uniworld.use_t5` in the model's config.json is
            false; True requires it, False leaves it out (9.5 GB).
        connectors: folder with `denoise_projector.bin` or `siglip_projector.bin` of a training stage, whose weights
            replace the checkpoint's.
        in_host: parts, as `UniWorld` names them, whose weights are left in host memory for who moves them himself; or
            what chooses them, called with the model while its parameters are on meta, of the dtype they will have.
        meanwhile: called with the model once all but the DiT is there, while that is read.

    Raises:
        FileNotFoundError: a folder, file or shard is missing.
        ValueError: keys, shapes, dtypes or values of the weights do not fit; all of a folder's listed in one line.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = checked_dtype(dtype or default_dtype(device, tiny=str(model) == TINY))
    folders = _find(model, flux, siglip, use_t5)
    config = read_config(folders.model)
    denoiser_config(config, folders.model)  # says at once that a folder is no UniWorld checkpoint
    settings = {"references": REFERENCES[0], **config.get("uniworld", {})}
    if settings["references"] not in REFERENCES:
        allowed = ", ".join(REFERENCES)
        raise ValueError(f"{folders.model}: uniworld.references={settings['references']!r}: must be one of {allowed}")
    processor = _processor(folders.model, images_last(config, folders.model))
    _fill_token_ids(config, processor)

    parts, plans = _plan_all(folders, config, device, dtype)
    time_shift, task_head = _time_shift(folders.flux), _task_head(folders.model, device, dtype, check_finite)
    for plan in plans:
        plan.check()
    check_widths(folders.model, parts, task_head)
    made = UniWorld(
        name=str(model),
        folder=folders.model,
        config=config,
        processor=processor,
        **parts,
        task_head=task_head,
        time_shift=time_shift,
        anchor_px=settings.get("anchor_px", FULL_ANCHOR_PX),
        **drawing_defaults(config, folders.model),
        images_last=processor.own_turn,
        references=settings["references"],
        random_weights=settings.get("random_weights", False),
        known_world=KnownWorld.load(folders.siglip),
        device=device,
        dtype=dtype,
    )
    _leave_in_host(made, parts, plans, in_host)
    for part in parts.values():
        part.eval()
    with byte_progress(f"Loading {model}", sum(plan.num_bytes for plan in plans), progress) as advance:
        _read_all(made, plans, connectors, meanwhile, check_finite=check_finite, advance=advance)
    return made


def _read_all(
    made: UniWorld,
    plans: Sequence[Plan],
    connectors: str | Path | None,
    meanwhile: Callable[[UniWorld], None] | None,
    **read: Any,
) -> None:
    """Fill the plans, the DiT's last; the arguments of `load_uniworld`, and those of `fill`."""
    univa, *encoders = plans
    first, dit = univa.split(made.denoiser)
    fill([first, *encoders], **read)
    if connectors is not None:
        own = {name: part for name in CONNECTORS if (part := getattr(made, name)) is not None}
        override_connectors(own, Path(connectors), read["check_finite"])
    if meanwhile is None:
        fill([dit], **read)
        return
    with filling([dit], **read):
        meanwhile(made)


def drawing_defaults(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of the steps and the guidance of a request that names none.

    Raises: ValueError naming the field.
    """
    own = config.get("uniworld", {})
    steps = {"num_inference_steps": own.get("num_inference_steps", 28)}
    steps["edit_inference_steps"] = own.get("edit_inference_steps", steps["num_inference_steps"])
    for name, value in steps.items():
        if type(value) is not int or not 1 <= value <= MAX_STEPS:
            raise ValueError(f"{folder}: uniworld.{name}={value!r}: must be from 1 to {MAX_STEPS}")
    guidance = own.get("guidance_scale", 3.5)
    if type(guidance) not in (int, float) or not 0 <= guidance <= MAX_GUIDANCE:
        raise ValueError(f"{folder}: uniworld.guidance_scale={guidance!r}: must be from 0 to {MAX_GUIDANCE}")
    return {**steps, "guidance_scale": float(guidance)}


def images_last(config: dict[str, Any], folder: Path) -> bool:
    """Whether a checkpoint's config.json says that pictures stand behind a conversation's last message.

    Raises: ValueError naming the field.
    """
    value = config.get("uniworld", {}).get("images_last", False)
    if type(value) is not bool:
        raise ValueError(f"{folder}: uniworld.images_last={value!r}: must be true or false")
    return value


def model_folder(model: str | Path) -> Path:
    """The local folder of a checkpoint, fetched or made first where it is a Hub id or "tiny"."""
    folder = tiny_dir() if str(model) == TINY else locate.resolve_folder("model", model, locate.MODEL_PATTERNS)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model={model}: has no config.json")
    return folder


def _find(model: str | Path, flux: str | Path | None, siglip: str | Path | None, use_t5: bool | None) -> Folders:
    folder = model_folder(model)
    if use_t5 is None:  # what a model of ours says of its own training
        use_t5 = read_config(folder).get("uniworld", {}).get("use_t5")
    patterns = locate.FLUX_PATTERNS + (() if use_t5 is False else locate.FLUX_T5_PATTERNS)
    flux_folder = locate.resolve_part("flux", flux, folder, patterns, FLUX_EXAMPLE)
    siglip_folder = locate.resolve_part("siglip", siglip, folder, locate.SIGLIP_PATTERNS, SIGLIP_EXAMPLE)
    has_t5 = (flux_folder / "text_encoder_2" / "config.json").is_file()
    if use_t5 and not has_t5:
        raise FileNotFoundError(f"use_t5=True: {flux_folder} has no text_encoder_2/")
    return Folders(folder, flux_folder, siglip_folder, has_t5 and use_t5 is not False)


def _processor(folder: Path, own_turn: bool) -> PromptProcessor:
    vision = VisionProcessor(locate.read_json(folder / "preprocessor_config.json"))
    return PromptProcessor(_tokenizer("Qwen2Tokenizer", folder), vision, own_turn=own_turn)


def _tokenizer(name: str, folder: Path) -> Any:
    """A transformers tokenizer from local files, with an error that names the folder."""
    try:
        return load_tokenizer(folder, name)
    except FileNotFoundError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions for malformed files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{folder}: tokenizer cannot be read ({reason})") from error


def _fill_token_ids(config: dict[str, Any], processor: PromptProcessor) -> None:
    """`image_begin_token_id` and `image_end_token_id` are missing from freshly converted checkpoints."""
    for field, token in (("image_begin_token_id", VISION_START), ("image_end_token_id", VISION_END)):
        if config.get(field) is None:
            config[field] = processor.tokenizer.convert_tokens_to_ids(token)


def _plan_all(
    folders: Folders, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], list[Plan]]:
    """Every module of a `UniWorld` by the name of its field, still without weights, and the plans that fill them."""
    univa, parts = _plan_univa(folders.model, config, device, dtype)
    semantic, semantic_plan = _plan_siglip(folders.siglip, device, dtype)
    text_encoders, text_plans = _plan_text_encoders(folders, device, dtype)
    vae, vae_plan = _plan_vae(folders.flux, device, vae_dtype(device, dtype))
    encoders = {"semantic_encoder": semantic, "text_encoders": text_encoders, "vae": vae}
    return parts | encoders, [univa, semantic_plan, *text_plans, vae_plan]


def _leave_in_host(
    made: UniWorld,
    parts: Mapping[str, nn.Module],
    plans: Sequence[Plan],
    in_host: Collection[str] | Callable[[UniWorld], Collection[str]],
) -> None:
    """Let the plans fill these parts in host memory."""
    if callable(in_host):
        for plan in plans:
            for parameter in {p for target in plan.targets.values() for p in target.module.parameters()}:
                parameter.data = parameter.data.to(plan.dtype)
        in_host = in_host(made)
    hosted = [parts[name] for name in in_host if name in parts]
    homes = {module: torch.device("cpu") for part in hosted for module in part.modules()}
    for plan in plans:
        plan.homes = homes


def _plan_univa(
    folder: Path, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Plan, dict[str, nn.Module]]:
    headers = read_headers(locate.weight_files(folder))
    parts = build_univa(config, tower_shapes(headers, str(folder)))
    return univa_plan(folder, headers, parts, device, dtype), parts


def _plan_siglip(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[SemanticEncoder, Plan]:
    preprocessor = locate.read_json(folder / "preprocessor_config.json")
    with parameters_on_meta():
        encoder = SemanticEncoder.from_config(read_config(folder), preprocessor)
    return encoder, encoder_plan(folder, encoder.model, device, dtype, ignored=UNUSED_SIGLIP_KEYS)


def _plan_text_encoders(folders: Folders, device: torch.device, dtype: torch.dtype) -> tuple[TextEncoders, list[Plan]]:
    clip, t5 = folders.flux / "text_encoder", folders.flux / "text_encoder_2"
    clip_tokenizer = _tokenizer("CLIPTokenizer", folders.flux / "tokenizer")
    t5_parts = (read_config(t5), _tokenizer("T5Tokenizer", folders.flux / "tokenizer_2")) if folders.t5 else ()
    with parameters_on_meta():
        encoders = TextEncoders.from_config(read_config(clip), clip_tokenizer, *t5_parts)
    plans = [encoder_plan(clip, encoders.clip, device, dtype)]
    if folders.t5:
        plans.append(encoder_plan(t5, encoders.t5, device, dtype))
    return encoders, plans


def _plan_vae(flux: Path, device: torch.device, dtype: torch.dtype) -> tuple[ImageAutoencoder, Plan]:
    folder = flux / "vae"
    with parameters_on_meta():
        vae = ImageAutoencoder.from_config(read_config(folder))
    return vae, encoder_plan(folder, vae.model, device, dtype, stem="diffusion_pytorch_model")


def _task_head(folder: Path, device: torch.device, dtype: torch.dtype, check_finite: bool) -> TaskHead | None:
    path = folder / TASK_HEAD_FILE
    return TaskHead.from_file(path, check_finite).to(device, dtype) if path.is_file() else None


def _time_shift(flux: Path) -> TimeShift:
    """FLUX's shift parameters; those that the scheduler's config does not name keep FLUX.1-dev's values."""
    config = locate.read_json(flux / "scheduler" / "scheduler_config.json")
    return TimeShift(**{f.name: config[f.name] for f in fields(TimeShift) if f.name in config})
