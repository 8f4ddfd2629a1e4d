"""The DiT's text sequence: VLM, semantic-encoder and T5 states side by side, right-padded over a batch.

Letters: B batch, L VLM tokens, T tokens of one source, R = B * L_txt rows of the flattened text sequence, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uniworld.models.connectors import Connector


@dataclass(frozen=True)
class Conditioning:
    """What the DiT is conditioned on.

    txt: [B, L_txt, joint_attention_dim], valid rows first; txt_lengths: valid rows of each sample;
    pooled: [B, pooled_projection_dim].
    """

    txt: Tensor
    txt_lengths: tuple[int, ...]
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.txt_lengths)

    def select(self, index: int) -> "Conditioning":
        """One sample alone, without its padding."""
        length = self.txt_lengths[index]
        return Conditioning(self.txt[index : index + 1, :length], (length,), self.pooled[index : index + 1])

    @staticmethod
    def stack(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Join batches, padding to the longest; one part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.txt.shape[1] for part in parts)
        txt = [torch.nn.functional.pad(part.txt, (0, 0, 0, longest - part.txt.shape[1])) for part in parts]
        lengths = tuple(length for part in parts for length in part.txt_lengths)
        return Conditioning(torch.cat(txt), lengths, torch.cat([part.pooled for part in parts]))

    @property
    def lengths_if_padded(self) -> tuple[int, ...] | None:
        """`txt_lengths`, or None where no sample is padded (attention then takes its plain path)."""
        return None if all(n == self.txt.shape[1] for n in self.txt_lengths) else self.txt_lengths


@dataclass(frozen=True)
class TextLayout:
    """Where each source's rows go in the flattened text sequence [B * length]; -1 drops a row (VLM padding)."""

    vlm_rows: Tensor  # [B * L] int64
    siglip_rows: Tensor  # [num_images * tokens_per_image] int64
    t5_rows: Tensor  # [B * num_t5_tokens] int64
    lengths: tuple[int, ...]
    length: int  # longest of the batch


def layout_text(
    attention_mask: Tensor,
    image_ends: Sequence[Sequence[int]],
    num_siglip_tokens: int = 0,
    num_t5_tokens: int = 0,
) -> TextLayout:
    """Place every token: an image's semantic tokens stand immediately before its `<|vision_end|>`, T5 tokens last.

    The order is free for the DiT (all text positions are zero); it is the authors' for the VLM and SigLIP tokens.

    Args:
        attention_mask: [B, L] on the CPU, 1 where a VLM token is real; padding on either side.
        image_ends: for each sample, the column of each image's `<|vision_end|>`.
        num_siglip_tokens: semantic tokens an image (0: none are inserted).
        num_t5_tokens: T5 tokens a sample (0: none).
    """
    mask = attention_mask.bool()
    B, L = mask.shape
    shift = torch.zeros(B, L, dtype=torch.int64)
    for sample, ends in enumerate(image_ends):
        for end in ends:
            shift[sample, end:] += num_siglip_tokens
    columns = mask.cumsum(1) - 1 + shift
    num_vlm = [int(mask[b].sum()) + num_siglip_tokens * len(image_ends[b]) for b in range(B)]
    lengths = tuple(n + num_t5_tokens for n in num_vlm)
    length = max(lengths)

    offsets = torch.arange(B)[:, None] * length
    vlm_rows = torch.where(mask, columns + offsets, -1)
    before_end = torch.arange(-num_siglip_tokens, 0)
    siglip_rows = [vlm_rows[b, end] + before_end for b, ends in enumerate(image_ends) for end in ends]
    t5_rows = torch.tensor(num_vlm)[:, None] + torch.arange(num_t5_tokens) + offsets
    return TextLayout(
        vlm_rows=vlm_rows.flatten(),
        siglip_rows=torch.cat(siglip_rows) if siglip_rows else torch.empty(0, dtype=torch.int64),
        t5_rows=t5_rows.flatten(),
        lengths=lengths,
        length=length,
    )


def assemble(
    layout: TextLayout,
    *,
    vlm_states: Tensor,
    denoise_projector: Connector,
    pooled: Tensor,
    siglip_states: Tensor | None = None,
    siglip_projector: Connector | None = None,
    t5_states: Tensor | None = None,
) -> Conditioning:
    """Project every source and write it to its rows; differentiable with respect to the connectors.

    Args:
        layout: from `layout_text`, made with the same sources.
        vlm_states: [B, L, D_vlm]; siglip_states: [num_images, T, D_siglip] or None; t5_states: [B, T, D_joint] or None.
        pooled: [B, P].
    """
    B, device = vlm_states.shape[0], vlm_states.device
    num_rows = B * layout.length
    txt = denoise_projector(vlm_states.flatten(0, 1), rows=layout.vlm_rows.to(device), num_rows=num_rows)
    if siglip_states is not None and siglip_states.shape[0] > 0:
        txt = siglip_projector(siglip_states.flatten(0, 1), rows=layout.siglip_rows.to(device), out=txt)
    if t5_states is not None:
        txt = txt.index_copy(0, layout.t5_rows.to(device), t5_states.flatten(0, 1).to(txt.dtype))
    return Conditioning(txt.view(B, layout.length, -1), layout.lengths, pooled)
