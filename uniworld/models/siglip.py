"""The frozen semantic image encoder: SigLIP's vision tower of transformers.

Letters: N images, T tokens an image, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from uniworld.models.vision_processor import normalized


class SemanticEncoder(nn.Module):
    """Pictures to semantic states. `model` is transformers' `SiglipVisionModel`, which SigLIP2 (fixed size) shares.

    Args:
        preprocessor: the folder's preprocessor_config.json.
    """

    def __init__(self, model: nn.Module, preprocessor: dict[str, Any]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessor = preprocessor

    @classmethod
    def from_config(
        cls, config: dict[str, Any], preprocessor: dict[str, Any], attention: str = "sdpa"
    ) -> "SemanticEncoder":
        """Build without weights from the config.json of a SigLIP folder or of its vision tower alone.

        The pooling head is left out: its output is not used.
        """
        from transformers import SiglipVisionConfig, SiglipVisionModel

        vision = dict(config.get("vision_config", config)) | {"vision_use_head": False}
        vision = {k: v for k, v in vision.items() if k not in ("architectures", "dtype", "torch_dtype")}
        hf_config = SiglipVisionConfig(**vision)
        hf_config._attn_implementation = attention
        return cls(SiglipVisionModel(hf_config), preprocessor)

    def restore_buffers(self, device: torch.device | str) -> None:
        """Make the position ids, which no checkpoint holds, anew: for a model that was built on meta."""
        for module in self.modules():
            if "position_ids" in module._buffers:
                num_positions = module._buffers["position_ids"].shape[-1]
                module._buffers["position_ids"] = torch.arange(num_positions, device=device).expand(1, -1)

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_tokens(self) -> int:
        """Tokens an image."""
        return (self.model.config.image_size // self.model.config.patch_size) ** 2

    @property
    def size_px(self) -> int:
        """Side of the squares that pictures are resized to."""
        return self.model.config.image_size

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> [N, 3, height, width] fp32, resized to the encoder's own size."""
        config = self.preprocessor
        size = (config["size"]["width"], config["size"]["height"])
        resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
        scale, mean, std = config["rescale_factor"], config["image_mean"], config["image_std"]
        return torch.stack(
            [normalized(image.convert("RGB").resize(size, resample), scale, mean, std) for image in images]
        )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, height, width] -> the last hidden state after the final norm, [N, T, D]."""
        weight = next(self.model.parameters())
        return self.model(pixel_values.to(weight.device, weight.dtype)).last_hidden_state
