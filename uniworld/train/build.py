"""What a run is made of: the model that is trained, and where its batches come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from uniworld.checkpoint.load import load_uniworld
from uniworld.config import TrainConfig
from uniworld.data.loader import Loader
from uniworld.models.siglip import SemanticEncoder
from uniworld.models.unified import UniWorld
from uniworld.train.blocks import prepare_blocks
from uniworld.train.encode import Encoders
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.sharding import DTYPES, World
from uniworld.train.stages import freeze_except, inserts_siglip, trained_patterns


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


def load_parts(config: TrainConfig, world: World) -> UniWorld:
    """All parts, frozen, in the compute dtype on this rank's device."""
    model = config.model
    parts = load_uniworld(
        model.path,
        model.flux,
        model.siglip,
        device=world.device,
        dtype=DTYPES[config.sharding.dtype],
        progress=world.rank == 0,
        use_t5=model.use_t5,
        connectors=model.connectors,
    )
    parts.denoiser.attention_backend = model.attention
    return parts


def build_train_model(config: TrainConfig, parts: UniWorld) -> TrainModel:
    """The module that is trained: parameters of the stage require gradients, blocks run as configured."""
    torch.manual_seed(config.seed)
    model = TrainModel(parts.denoiser, parts.denoise_projector, parts.siglip_projector)
    freeze_except(model, trained_patterns(config.stage))
    prepare_blocks(model.denoiser, config.sharding)
    return model


def open_batches(config: TrainConfig, parts: UniWorld, world: World) -> Batches:
    """Batches of this rank, encoded as they come."""
    use_siglip = inserts_siglip(config.stage)
    encoders = Encoders(parts, use_siglip=use_siglip, use_t5=config.model.use_t5)
    loader = Loader(
        config,
        processor=parts.processor,
        siglip_preprocess=preprocess_alone(parts.semantic_encoder) if use_siglip else None,
        siglip_tokens=parts.semantic_encoder.num_tokens if use_siglip else 0,
        bad_log=Path(config.run_dir) / f"bad_samples_rank{world.rank}.jsonl",
        rank=world.rank,
        world_size=world.size,
    )
    return Batches(loader, encoders.encode, lambda: loader.bad.count)


def preprocess_alone(encoder: SemanticEncoder) -> Callable[..., torch.Tensor]:
    """The encoder's `preprocess` without its weights, so that loader processes do not take them along."""
    return SemanticEncoder(nn.Identity(), encoder.preprocessor).preprocess
