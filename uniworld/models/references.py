"""What stands for a reference picture in the DiT's text stream, beside the picture's VLM states.

"siglip"  states of the semantic encoder, through `siglip_projector`
"vae"     packed VAE latents, through `vae_projector`; they say nothing of their place, as text positions are all zero
"none"    nothing

Letters: N pictures, S their side in pixels, T tokens a picture, C latent channels.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from uniworld.models.flow import TOKEN_PX, pack
from uniworld.models.vae import ImageAutoencoder, to_pixels

REFERENCES = ("siglip", "vae", "none")


class LatentEncoder:
    """Pictures to packed latents, called like `SemanticEncoder`, on squares of the same size and so as many tokens.

    Args:
        vae: None makes one that can only `preprocess`.
        size_px: S, a multiple of 16.
    """

    def __init__(self, vae: ImageAutoencoder | None, size_px: int):
        if size_px % TOKEN_PX:
            raise ValueError(f"references=vae: the semantic encoder's {size_px} px are no multiple of {TOKEN_PX}")
        self.vae, self.size_px = vae, size_px

    @property
    def num_tokens(self) -> int:
        """Tokens a picture, T."""
        return (self.size_px // TOKEN_PX) ** 2

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> [N, 3, S, S] fp32 in [-1, 1]."""
        size = (self.size_px, self.size_px)
        resized = (image.convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in images)
        # Colours last in memory, as they come, torch's group norm on a CPU is off by 1e-4 where a picture is flat.
        return torch.cat([to_pixels(image) for image in resized]).contiguous()

    def __call__(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> the means of the latents as the DiT takes them, packed 2x2: [N, T, 4C]."""
        return pack(self.vae.mean_latents(pixels))
