"""From packed latents to a picture."""

import torch

from uniworld.engine.request import Job
from uniworld.models import flow
from uniworld.models.vae import ImageAutoencoder, to_pil


class Decoder:
    def __init__(self, vae: ImageAutoencoder, device: torch.device):
        """device: where it will run; its weights may wait elsewhere. To be made before what moves weights about."""
        self.vae = vae
        if device.type == "cuda":
            vae.use_channels_last()

    @torch.inference_mode()
    def run(self, batch: list[Job]) -> None:
        """Fill `image` of every job, one at a time: the decoder's activations are the engine's largest."""
        for job in batch:
            latents = flow.unpack(job.latents, job.height, job.width)
            self.vae.set_tiling(job.request.vae_tiling)
            job.image = to_pil(self.vae.decode(latents))[0]
