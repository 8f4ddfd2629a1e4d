"""One training loss: what is drawn at random, and the model's forward pass. Knows nothing of processes.

Letters: B batch, C latent channels, h, w latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from uniworld.config import FlowConfig, TrainConfig
from uniworld.models.flow import sigmas
from uniworld.train.encode import draw_latents
from uniworld.train.model import EncodedBatch
from uniworld.train.noise import draw_sigma, sigma_weight

DROP_T5, ROLLOUT, DROP_SIGLIP = 3, 4, 5  # kinds of random draws; the data's are 0 to 2


@dataclass(frozen=True)
class Draw:
    """What is random in a loss: sigma [B], noise and latents [B, C, h, w], all fp32 on the batch's device."""

    sigma: Tensor
    noise: Tensor
    latents: Tensor


def draw(batch: EncodedBatch, flow: FlowConfig, generator: torch.Generator) -> Draw:
    """Noise levels, noise and a fresh sample of the VAE's posterior.

    Everything is drawn on the CPU in this order, so that a seed gives one run on every device.
    """
    device = batch.latent_mean.device
    sigma = draw_sigma(flow, len(batch), batch.num_image_tokens, generator)
    noise = torch.randn(batch.latent_mean.shape, generator=generator)
    return Draw(sigma.to(device), noise.to(device), draw_latents(batch, generator))


def training_loss(
    model: Callable[..., Tensor],
    batch: EncodedBatch,
    flow: FlowConfig,
    generator: torch.Generator,
    *,
    rollout: bool = False,
) -> Tensor:
    """The loss of one micro-batch, a scalar with a graph.

    Args:
        model: `TrainModel` or whatever wraps it.
        batch: on the model's device.
        generator: on the CPU; advanced by what `draw` takes.
        rollout: whether to learn the second of two sampling steps, see `TrainModel.forward`.
    """
    drawn = draw(batch, flow, generator)
    if rollout:
        second = sigmas(2, batch.num_image_tokens)[1].item()
        sigma = torch.full_like(drawn.sigma, second)
        return model(batch, drawn.latents, drawn.noise, sigma, flow.guidance_scale, rollout=True)
    level_weight = sigma_weight(flow.weighting, drawn.sigma)
    return model(batch, drawn.latents, drawn.noise, drawn.sigma, flow.guidance_scale, level_weight)


def drop_states(batch: EncodedBatch, config: TrainConfig, step: int, number: int) -> EncodedBatch:
    """The batch without T5 states in `data.drop_t5_rate` of all micro-batches, without semantic ones in
    `data.drop_siglip_rate`, else as it is.

    All ranks drop at the same time, so that their costs stay near; it follows from the seed, as after a resume.

    Args:
        step, number: of the micro-batch, counted over the run and in its step.
    """
    rates = {
        "t5_states": (config.data.drop_t5_rate, DROP_T5),
        "siglip_states": (config.data.drop_siglip_rate, DROP_SIGLIP),
    }
    dropped = [name for name, (rate, kind) in rates.items() if _happens(rate, config, kind, step, number)]
    return replace(batch, **dict.fromkeys(dropped)) if dropped else batch


def rolls_out(config: TrainConfig, step: int, number: int) -> bool:
    """Whether this micro-batch is one of the `flow.rollout_share`; on all ranks at once, as in `drop_states`."""
    return _happens(config.flow.rollout_share, config, ROLLOUT, step, number)


def _happens(rate: float, config: TrainConfig, kind: int, step: int, number: int) -> bool:
    return bool(np.random.default_rng((config.seed, kind, step, number)).random() < rate)


def rank_generator(seed: int, rank: int) -> torch.Generator:
    """The CPU generator of a rank; ranks and seeds give unrelated streams."""
    mixed = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (rank + 1,), generator=mixed)
    return torch.Generator().manual_seed(int(seeds[rank]))
