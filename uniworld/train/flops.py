"""Floating-point operations of a training step, and how much of a GPU's peak they use.

Counted are the matrix products of DiT and connectors: forward, gradients with respect to inputs, and gradients with
respect to the weights that are trained. Without frozen weights that is three times the forward pass, F(S) =
24 n D^2 S + 4 n D S^2 for n blocks of width D. Not counted: the frozen encoders, norms and elementwise work, and what
gradient checkpointing computes twice, so that the utilisation is of useful work.

Letters: S tokens, img and txt tokens of the two streams, D width.
"""

import torch
from torch import nn

from uniworld.models.connectors import Connector
from uniworld.train.model import EncodedBatch, TrainModel

# Dense bf16 rates in FLOP/s by a part of `torch.cuda.get_device_name()`, from NVIDIA's data sheets; first match counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 rate of a device; None where we do not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


class StepFlops:
    """FLOPs of a batch as a function of its tokens; counts the model's weights once, before they are sharded."""

    def __init__(self, model: TrainModel):
        denoiser = model.denoiser
        self.num_blocks = denoiser.config.num_layers + denoiser.config.num_single_layers
        self.dim = denoiser.config.dim
        self.per_token = {"img": 0, "txt": 0, "both": 0}
        for name, linear in denoiser.named_modules():
            if isinstance(linear, nn.Linear) and (stream := _stream(name)):
                self.per_token[stream] += _linear_flops(linear)
        self.vlm_token = _connector_flops(model.denoise_projector)
        self.siglip_token = _connector_flops(model.reference_projector)

    def __call__(self, batch: EncodedBatch) -> float:
        """FLOPs of one loss and its gradients."""
        num_siglip = 0 if batch.siglip_states is None else batch.siglip_states.shape[0] * batch.siglip_states.shape[1]
        total = float(int(batch.attention_mask.sum()) * self.vlm_token + num_siglip * self.siglip_token)
        for img, txt in sample_tokens(batch):
            S = img + txt
            total += img * self.per_token["img"] + txt * self.per_token["txt"] + S * self.per_token["both"]
            total += 3 * 4 * self.num_blocks * self.dim * S * S
        return total


def sample_tokens(batch: EncodedBatch) -> list[tuple[int, int]]:
    """Image and text tokens of each sample, without padding."""
    siglip, t5 = batch.siglip_states, batch.t5_states
    num_t5 = 0 if t5 is None else t5.shape[1]
    per_image = 0 if siglip is None else siglip.shape[1]
    num_vlm = batch.attention_mask.sum(1).tolist()
    return [
        (batch.num_image_tokens, n + per_image * len(ends) + num_t5) for n, ends in zip(num_vlm, batch.image_ends)
    ]


def _stream(name: str) -> str | None:
    """Whose tokens a linear of the DiT sees; None where it runs once a sample (modulation, embeddings)."""
    if "norm" in name or name.startswith("time_text_embed"):
        return None
    if name.startswith("single_transformer_blocks"):
        return "both"
    return "txt" if "add_" in name or "context" in name else "img"


def _linear_flops(linear: nn.Linear, *, input_gradient: bool = True) -> int:
    """FLOPs a token: forward, and the gradients that are needed."""
    products = 1 + input_gradient + linear.weight.requires_grad
    return 2 * products * linear.in_features * linear.out_features


def _connector_flops(connector: Connector) -> int:
    first, _, second = connector
    trained = first.weight.requires_grad
    return _linear_flops(first, input_gradient=False) + _linear_flops(second, input_gradient=trained)
