"""The frozen image autoencoder of FLUX: diffusers' AutoencoderKL, with the DiT's latent scaling.

Letters: B images, C latent channels, H, W pixels, h, w latents (an eighth of the pixels).
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class ImageAutoencoder(nn.Module):
    """Pixels in [-1, 1] to latents as the DiT takes them, (x - shift) * scale, and back. `model` is `AutoencoderKL`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImageAutoencoder":
        """Build without weights from the config.json of a FLUX folder's `vae`."""
        from diffusers import AutoencoderKL

        return cls(AutoencoderKL.from_config(dict(config)))

    def set_tiling(self, enabled: bool) -> None:
        """Work through large images in overlapping tiles: bounded memory, slightly different pixels."""
        self.model.use_tiling = enabled

    def use_channels_last(self) -> None:
        """Keep the weights of convolutions with channels last in memory, so that activations come to lie so too.

        That is how tensor cores read them: cuDNN need not rearrange every operand.
        """
        self.model.to(memory_format=torch.channels_last)

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> mean and standard deviation of the unscaled latents, each [B, C, h, w]."""
        posterior = self._posterior(pixels)
        return posterior.mean, posterior.std

    def mean_latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], scaled, without noise."""
        return self._scaled(self._posterior(pixels).mean)

    def sample_latents(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], scaled, drawn from the posterior as in training."""
        return self._scaled(self._posterior(pixels).sample(generator=generator))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W]."""
        latents = latents.to(self.model.device, torch.float32) / self.scale + self.shift
        return self.model.decode(latents.to(self.model.dtype)).sample

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> Any:
        return self.model.encode(pixels.to(self.model.device, self.model.dtype)).latent_dist

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels in [-1, 1], [B, 3, H, W] -> pictures; values outside are clipped."""
    levels = (pixels.float() / 2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    rows = levels.permute(0, 2, 3, 1).contiguous()  # on the device; Pillow would do it more slowly
    return [Image.fromarray(image) for image in rows.cpu().numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """A picture -> [1, 3, H, W] fp32 in [-1, 1]."""
    levels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return levels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
