"""What the loader hands to the trainer: a batch of samples before the frozen encoders.

Letters: B samples, N reference pictures of the whole batch, H, W target height and width in pixels.
"""

from dataclasses import dataclass

from torch import Tensor

from uniworld.models.prompts import VLMInputs


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """B samples whose targets have one size; everything is on the CPU.

    inputs: the VLM's view of the B prompts, padded on the left.
    siglip_pixels: [N, 3, S, S] fp32, the semantic encoder's view of the references in prompt order; None without any.
    instructions: the words alone, for T5 and CLIP; "" where the prompt was dropped.
    target: [B, 3, H, W] fp32 in [-1, 1].
    region_weight: [B, 1, H / 8, W / 8] fp32, or None where every latent weighs 1.
    sample_ids: where each sample comes from, such as "edits.json:17".
    """

    inputs: VLMInputs
    siglip_pixels: Tensor | None
    instructions: tuple[str, ...]
    target: Tensor
    region_weight: Tensor | None
    sample_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def num_tokens(self, siglip_tokens: int = 0) -> int:
        """Tokens the DiT attends to, over the batch: target, VLM and `siglip_tokens` semantic tokens a reference."""
        targets = self.target.shape[0] * self.target.shape[2] * self.target.shape[3] // 256
        references = 0 if self.siglip_pixels is None else len(self.siglip_pixels)
        return targets + int(self.inputs.attention_mask.sum()) + references * siglip_tokens
