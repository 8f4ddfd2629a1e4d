"""Flow matching: time shift, sampling sigmas, 2x2 packing of latents, position ids.

Letters: B batch, L packed image tokens, C latent channels, h, w latent height and width (pixels / 8).
"""

import math

import torch
from torch import Tensor

from uniworld.kernels.flow_noise import pack

__all__ = ["image_ids", "initial_noise", "pack", "shift_mu", "sigmas", "time_shift", "unpack"]

LATENT_SCALE = 8  # pixels a latent, along each axis
TOKEN_PX = 16  # pixels a packed token, along each axis


def shift_mu(
    num_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> float:
    """The time-shift parameter mu, linear in the number of packed image tokens (FLUX.1)."""
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    return base_shift + slope * (num_tokens - base_image_seq_len)


def time_shift(sigma: Tensor, mu: float) -> Tensor:
    """sigma' = e^mu / (e^mu + (1 / sigma - 1)); sigma in (0, 1], any shape."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def sigmas(num_inference_steps: int, num_tokens: int, **shift: float) -> Tensor:
    """The noise levels of a sampling run, from 1 down to 0.

    Args:
        num_inference_steps: n, at least 1.
        num_tokens: packed image tokens, (height / 16) * (width / 16).
        shift: overrides of `shift_mu`'s parameters, from the scheduler's config.

    Returns: [n + 1] fp32 on the CPU; the last entry is 0. Computed in fp64.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
    linear = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps, dtype=torch.float64)
    shifted = time_shift(linear, shift_mu(num_tokens, **shift))
    return torch.cat([shifted, shifted.new_zeros(1)]).to(torch.float32)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for an image of `height` x `width` pixels: [B, L, 4C] -> [B, C, height/8, width/8]."""
    B, L, C4 = packed.shape
    h, w = height // TOKEN_PX, width // TOKEN_PX
    latents = packed.view(B, h, w, C4 // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(B, C4 // 4, h * 2, w * 2)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Rope positions (0, row, column) of the packed tokens of an image, row by row: [L, 3] fp32."""
    h, w = height // TOKEN_PX, width // TOKEN_PX
    ids = torch.zeros(h, w, 3, device=device)
    ids[..., 1] += torch.arange(h, device=device)[:, None]
    ids[..., 2] += torch.arange(w, device=device)[None, :]
    return ids.view(h * w, 3)


def initial_noise(seed: int, height: int, width: int, num_channels: int = 16) -> Tensor:
    """Packed Gaussian noise of one sample, [1, L, 4 * num_channels] fp32.

    Drawn on the CPU whatever the device, so that a seed gives one picture on every machine and in every batch.
    """
    shape = (1, num_channels, height // LATENT_SCALE, width // LATENT_SCALE)
    return pack(torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)))
