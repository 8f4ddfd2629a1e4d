"""How training draws noise levels, and what a level weighs.

Source: UniWorld-V1; densities and weightings of Stable Diffusion 3 (Esser et al., 2024, section 3.1).
"""

import math

import torch
from torch import Tensor

from uniworld.config import FlowConfig
from uniworld.models.flow import shift_mu, time_shift


def draw_sigma(config: FlowConfig, batch_size: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch, [B] fp32 on the CPU, shifted for `num_tokens` packed image tokens."""
    if config.density == "logit_normal":
        z = config.logit_mean + config.logit_std * torch.randn(batch_size, generator=generator)
        return shifted(z.sigmoid(), num_tokens)
    u = torch.rand(batch_size, generator=generator)
    if config.density == "mode":
        u = 1 - u - config.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return shifted(u.clamp(min=1e-5, max=1.0), num_tokens)


def shifted(sigma: Tensor, num_tokens: int) -> Tensor:
    """The resolution-dependent shift that sampling uses too."""
    return time_shift(sigma, shift_mu(num_tokens))


def sigma_weight(weighting: str, sigma: Tensor) -> Tensor | None:
    """Loss weight of each noise level, [B]; None where all weigh the same."""
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return None
