"""The frozen text encoders of FLUX: CLIP-L for the pooled embedding and, optionally, T5-XXL.

Letters: B prompts, T tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

T5_MAX_LENGTH = 256


class TextEncoders(nn.Module):
    """`clip` is transformers' `CLIPTextModel`, `t5` its `T5EncoderModel` or None."""

    def __init__(self, clip: nn.Module, clip_tokenizer: Any, t5: nn.Module | None = None, t5_tokenizer: Any = None):
        super().__init__()
        if (t5 is None) != (t5_tokenizer is None):
            raise ValueError("t5, t5_tokenizer: give both, or neither")
        self.clip = clip.eval().requires_grad_(False)
        self.t5 = None if t5 is None else t5.eval().requires_grad_(False)
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    @classmethod
    def from_config(
        cls,
        clip_config: dict[str, Any],
        clip_tokenizer: Any,
        t5_config: dict[str, Any] | None = None,
        t5_tokenizer: Any = None,
    ) -> "TextEncoders":
        """Build without weights from the config.json of `text_encoder` and `text_encoder_2` of a FLUX folder."""
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        left_out = ("architectures", "dtype", "torch_dtype", "model_type")
        clip_config = {k: v for k, v in clip_config.items() if k not in left_out}
        clip = CLIPTextModel(CLIPTextConfig(**clip_config))
        t5 = None
        if t5_config is not None:
            t5 = T5EncoderModel(T5Config(**{k: v for k, v in t5_config.items() if k not in left_out}))
        return cls(clip, clip_tokenizer, t5, t5_tokenizer)

    def restore_buffers(self, device: torch.device | str) -> None:
        """Make CLIP's position ids, which no checkpoint holds, anew: for a model that was built on meta."""
        for module in self.modules():
            if "position_ids" in module._buffers:
                num_positions = module._buffers["position_ids"].shape[-1]
                module._buffers["position_ids"] = torch.arange(num_positions, device=device).expand(1, -1)

    @property
    def has_t5(self) -> bool:
        return self.t5 is not None

    @torch.no_grad()
    def t5_states(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """[B, max_length, D]: every prompt padded or cut to one length; padding is attended, as FLUX was trained.

        Args:
            max_length: by default 256, or the tokenizer's own limit where that is lower.
        """
        if self.t5 is None:
            raise ValueError("use_t5=True: no T5 is loaded")
        if max_length is None:
            max_length = min(T5_MAX_LENGTH, self.t5_tokenizer.model_max_length)
        ids = token_ids(self.t5_tokenizer, prompts, max_length)
        return self.t5(ids.to(self.t5.device)).last_hidden_state

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """[B, D]: CLIP's state of the end token; prompts are cut to CLIP's length."""
        ids = token_ids(self.clip_tokenizer, prompts, self.clip.config.max_position_embeddings)
        return self.clip(ids.to(self.clip.device)).pooler_output


def token_ids(tokenizer: Any, prompts: Sequence[str], max_length: int) -> Tensor:
    """[B, max_length] int64: prompts padded or cut to one length."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return tokens.input_ids
