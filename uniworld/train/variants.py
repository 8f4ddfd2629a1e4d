"""Variants of the model that `model.references` and `model.num_queries` name, put together for training.

The published model knows pictures by the semantic encoder's states and words by the VLM's; see
`uniworld.models.references` and `uniworld.models.queries` for what may stand in their places.
"""

from uniworld.checkpoint.load import DenoiserParts
from uniworld.config import TrainConfig
from uniworld.models.queries import LearnedQueries
from uniworld.models.unified import UniWorld
from uniworld.train.model import TrainModel
from uniworld.train.stages import references_of


def apply_variant(config: TrainConfig, parts: UniWorld | DenoiserParts) -> None:
    """Have a loaded model encode and draw as the run trains it; queries it lacks are drawn from the run's seed.

    Raises: ValueError where the checkpoint holds other queries than the config names, or no connector for latents.
    """
    num, queries = config.model.num_queries, parts.queries
    if queries is not None and queries.num != num:
        raise ValueError(f"model.num_queries={num}: {config.model.path} was trained with {queries.num}")
    if not isinstance(parts, UniWorld):
        return
    parts.references = references_of(config)
    if config.model.references == "vae" and parts.vae_projector is None:
        raise ValueError(f"model.references=vae: {config.model.path} has no vae_projector")
    if num and queries is None:
        parts.queries = LearnedQueries.fresh(num, parts.vlm.model.get_input_embeddings().weight, config.seed)


def variant_model(config: TrainConfig, parts: UniWorld | DenoiserParts) -> TrainModel:
    """The module to train, of parts that `apply_variant` has seen."""
    modules = parts.denoiser, parts.denoise_projector, parts.siglip_projector
    if not config.model.needs_live_encoding:
        return TrainModel(*modules)
    return TrainModel(
        *modules,
        vae_projector=parts.vae_projector if config.model.references == "vae" else None,
        queries=parts.queries,
        states_after=parts.vlm.states_after,
    )
