"""What a run is made of: the model that is trained, and where its batches come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from uniworld.checkpoint.load import DenoiserParts, load_denoiser, load_uniworld
from uniworld.checkpoint.progress import count_progress
from uniworld.config import TrainConfig
from uniworld.data.loader import Loader
from uniworld.models.references import LatentEncoder
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.unified import UniWorld
from uniworld.train.blocks import prepare_blocks
from uniworld.train.encode import Encoders
from uniworld.train.lora import add_lora
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.precomputed import PrecomputedLoader, open_caches
from uniworld.train.sharding import DTYPES, World
from uniworld.train.stages import freeze_except, inserts_siglip, patterns_of
from uniworld.train.variants import apply_variant, variant_model


class BatchSource(Protocol):
    """An endless iterator of batches that knows its place."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Batches:
    """Where batches come from, and what makes encoder states of one."""

    source: BatchSource
    encode: Callable[[Any], EncodedBatch]
    num_bad: Callable[[], int]
    """Samples skipped so far on this rank."""


def check(config: TrainConfig) -> None:
    """Find out before 20 GB are loaded that there is nothing to train on. Raises: ValueError, FileNotFoundError."""
    if config.data.precomputed:
        open_caches(config)
        return
    if not config.data.sources:
        raise ValueError("data.sources: must name at least one source, or data.precomputed a cache")
    for number, source in enumerate(config.data.sources):
        if not any(letter in source.path for letter in "{*?[") and not Path(source.path).exists():
            raise FileNotFoundError(f"data.sources[{number}].path={source.path}: no such file or folder")


def load_parts(config: TrainConfig, world: World, shown: bool = False) -> UniWorld | DenoiserParts:
    """The parts that training needs, frozen, in the compute dtype on this rank's device.

    From precomputed states it needs no encoder; the rank that draws validation pictures still does.

    Args:
        shown: a progress bar on stderr.
    """
    model = config.model
    draws = config.validation.every_steps > 0 and (world.rank == 0 or config.sharding.zero_stage == 3)
    if config.data.precomputed and not draws:
        denoiser_parts = load_denoiser(
            model.path,
            device=world.device,
            dtype=DTYPES[config.sharding.dtype],
            progress=shown,
            connectors=model.connectors,
        )
        denoiser_parts.denoiser.attention_backend = model.attention
        apply_variant(config, denoiser_parts)
        return denoiser_parts
    parts = load_uniworld(
        model.path,
        model.flux,
        model.siglip,
        device=world.device,
        dtype=DTYPES[config.sharding.dtype],
        progress=shown,
        use_t5=model.use_t5,
        connectors=model.connectors,
    )
    parts.denoiser.attention_backend = model.attention
    apply_variant(config, parts)
    return parts


def build_train_model(config: TrainConfig, parts: UniWorld | DenoiserParts) -> TrainModel:
    """The module that is trained: parameters of the stage require gradients, blocks run as configured."""
    torch.manual_seed(config.seed)
    model = variant_model(config, parts)
    if config.model.lora_rank is not None:
        add_lora(model.denoiser, config.model.lora_rank)
    freeze_except(model, patterns_of(config))
    prepare_blocks(model.denoiser, config.sharding)
    return model


def open_batches(
    config: TrainConfig, parts: UniWorld | DenoiserParts, world: World, shown: bool = False
) -> Batches:
    """Batches of this rank, encoded as they come or read from precomputed states; `shown` as of `load_parts`."""
    bad_log = Path(config.run_dir) / f"bad_samples_rank{world.rank}.jsonl"
    if config.data.precomputed:
        cached = PrecomputedLoader(config, rank=world.rank, world_size=world.size, bad_log=bad_log)
        return Batches(cached, lambda batch: batch.to(parts.device, parts.dtype), lambda: cached.bad.count)
    use_siglip = inserts_siglip(config.stage)
    encoders = Encoders(parts, use_siglip=use_siglip, use_t5=config.model.use_t5)
    with count_progress("Reading picture sizes", shown) as progress:
        loader = Loader(
            config,
            processor=parts.processor,
            siglip_preprocess=preprocess_alone(parts.reference_encoder) if use_siglip else None,
            siglip_tokens=parts.reference_encoder.num_tokens if use_siglip else 0,
            bad_log=bad_log,
            rank=world.rank,
            world_size=world.size,
            progress=progress,
        )
    return Batches(loader, encoders.encode, lambda: loader.bad.count)


def preprocess_alone(encoder: SemanticEncoder | LatentEncoder) -> Callable[..., torch.Tensor]:
    """The encoder's `preprocess` without its weights, so that loader processes do not take them along."""
    if isinstance(encoder, LatentEncoder):
        return LatentEncoder(None, encoder.size_px).preprocess
    return SemanticEncoder(nn.Identity(), encoder.preprocessor).preprocess
