"""The frozen vision-language model: Qwen2.5-VL of transformers, run once a request for states and for text.

Letters: B batch, L tokens of the longest prompt, D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.models.prompts import IMAGE_TYPE, VLMInputs

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
VISION_KEYS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
    "out_hidden_size",
    "fullatt_block_indexes",
)
TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def qwen_config(config: dict[str, Any]):
    """A checkpoint's config.json -> transformers' `Qwen2_5_VLConfig`.

    Takes the flat layout of transformers 4 (the authors' `univa_qwen2p5vl`, Qwen2.5-VL folders on the Hub) and the
    nested one of transformers 5; keys that are not the VLM's are ignored.
    """
    from transformers import Qwen2_5_VLConfig

    text = config.get("text_config", config)
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if "mrope_section" not in rope:
        raise ValueError("config.json: rope_scaling.mrope_section is missing, this is no Qwen2.5-VL")
    rope = {
        "rope_type": "default",
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 1e6)),
        "mrope_section": rope["mrope_section"],
    }
    vision = config["vision_config"]
    vision = {"in_channels": vision.get("in_chans", 3)} | {key: vision[key] for key in VISION_KEYS if key in vision}
    return Qwen2_5_VLConfig(
        text_config={key: text[key] for key in TEXT_KEYS if key in text} | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        **{key: config[key] for key in TOKEN_KEYS if key in config},
    )


def rope_index(
    mm_token_type_ids: Tensor, attention_mask: Tensor, image_grid_thw: Tensor | None, merge_size: int
) -> tuple[Tensor, Tensor]:
    """The 3-D rotary positions: text advances all three by one, an image's tokens span its grid.

    Places without an image, such as a trailing `<|vision_start|>`, are text. Padding gets position 0.

    Args:
        mm_token_type_ids: [B, L], 1 where an image token stands; attention_mask: [B, L].
        image_grid_thw: [num_images, 3] in patches; merge_size: patches a token, along each axis.

    Returns: position_ids [3, B, L] and rope_deltas [B, 1] int64: token L + i that follows stands at L + i + delta.
    """
    B, L = mm_token_type_ids.shape
    grids = iter([] if image_grid_thw is None else image_grid_thw.tolist())
    position_ids = torch.zeros(3, B, L, dtype=torch.int64)
    rope_deltas = torch.zeros(B, 1, dtype=torch.int64)
    for b in range(B):
        columns = attention_mask[b].nonzero().flatten()
        parts, start = [], 0
        for kind, run in groupby(mm_token_type_ids[b, columns].tolist()):
            num_left = len(list(run))
            if kind != IMAGE_TYPE:
                parts.append(torch.arange(num_left).expand(3, -1) + start)
                start += num_left
                continue
            while num_left > 0:  # images may follow each other without a token in between
                frames, height, width = next(grids)
                height, width = height // merge_size, width // merge_size
                grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
                parts.append(grid.T + start)
                start += max(height, width)
                num_left -= len(grid)
        position_ids[:, b, columns] = torch.cat(parts, dim=1)
        rope_deltas[b] = start - L
    return position_ids, rope_deltas


@dataclass(frozen=True)
class VLMStates:
    """The result of one pass.

    hidden_states: [B, L, D] after the final norm; attention_mask: [B, L] on the CPU; position_ids: [3, B, L] and
    rope_deltas: [B, 1] on the CPU; past_key_values: transformers' cache, or None unless asked for.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rope_deltas: Tensor
    past_key_values: Any = None


class VisionLanguageModel(nn.Module):
    """Qwen2.5-VL, frozen. `model` is transformers' `Qwen2_5_VLForConditionalGeneration`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: dict[str, Any], attention: str = "sdpa") -> "VisionLanguageModel":
        """Build without weights from a checkpoint's config.json, under `torch.device("meta")` if wanted.

        Args:
            attention: transformers' name of the attention implementation.
        """
        from transformers import Qwen2_5_VLForConditionalGeneration

        hf_config = qwen_config(config)
        hf_config._attn_implementation = attention
        return cls(Qwen2_5_VLForConditionalGeneration(hf_config))

    def restore_buffers(self, device: torch.device | str) -> None:
        """Compute the rotary frequencies, which no checkpoint holds, anew: for a model that was built on meta."""
        for module in self.modules():
            if "inv_freq" in module._buffers:
                with torch.device("cpu"):
                    fresh = type(module)(module.config)
                for name, buffer in fresh.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def hidden_size(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def merge_size(self) -> int:
        return self.model.config.vision_config.spatial_merge_size

    @torch.no_grad()
    def encode(self, inputs: VLMInputs, use_cache: bool = False) -> VLMStates:
        """One pass over a batch of prompts; padding on either side is not attended.

        Args:
            use_cache: keep keys and values, so that `stream_text` can go on from here.
        """
        return self.states(inputs, use_cache)

    def states(self, inputs: VLMInputs, use_cache: bool = False) -> VLMStates:
        """As `encode`, with a graph where parameters require gradients."""
        mask = inputs.attention_mask
        position_ids, rope_deltas = rope_index(inputs.mm_token_type_ids, mask, inputs.image_grid_thw, self.merge_size)
        # Attention is causal: padding after a prompt reaches none of its tokens and needs no mask.
        padded_left = not mask[:, 0].all()
        seen = mask if padded_left else None
        seen = seen if inputs.sees is None else inputs.sees[:, None]
        images = {}
        if inputs.pixel_values is not None:
            dtype = self.model.model.visual.patch_embed.proj.weight.dtype
            images["pixel_values"] = inputs.pixel_values.to(self.device, dtype)
            images["image_grid_thw"] = inputs.image_grid_thw.to(self.device)
        # Both mm_token_type_ids and input_ids must be given: without them transformers silently counts other positions.
        output = self.model.model(
            input_ids=inputs.input_ids.to(self.device),
            mm_token_type_ids=inputs.mm_token_type_ids.to(self.device),
            attention_mask=None if seen is None else seen.to(self.device),
            position_ids=position_ids.to(self.device),
            use_cache=use_cache,
            **images,
        )
        past_key_values = output.past_key_values if use_cache else None
        return VLMStates(output.last_hidden_state, mask, position_ids, rope_deltas, past_key_values)

    def states_after(self, states: VLMStates, embeddings: Tensor) -> Tensor:
        """The states of more input embeddings after each prompt, differentiable in them.

        Args:
            states: from `encode(..., use_cache=True)`; left as they are.
            embeddings: [N, D], the same after every prompt.

        Returns: [B, N, D].
        """
        if states.past_key_values is None:
            raise ValueError("states: hold no cache, encode with use_cache=True")
        mask, num = states.attention_mask, len(embeddings)
        B, L = mask.shape
        positions = L + states.rope_deltas + torch.arange(num)
        output = self.model.model(
            inputs_embeds=embeddings.repeat(B, 1, 1),
            position_ids=positions.expand(3, B, num).to(self.device),
            attention_mask=None if mask.all() else F.pad(mask, (0, num), value=1).to(self.device),
            past_key_values=self._cache((layer.keys, layer.values) for layer in states.past_key_values.layers),
            use_cache=True,
        )
        return output.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.model.lm_head(hidden_states)

    def stream_text(
        self,
        states: VLMStates,
        row: int = 0,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Go on writing after a prompt, token by token, from the pass that `encode(..., use_cache=True)` made.

        The cache of `states` is left as it is, so the same states may be continued again.

        Args:
            row: which sample of the batch.
            temperature: 0 takes the likeliest token.
            top_p: sample among the likeliest tokens that together hold this probability.
            stop_ids: end before one of these tokens.
        """
        if states.past_key_values is None:
            raise ValueError("states: hold no cache, encode with use_cache=True")
        check_sampling(temperature, top_p, max_new_tokens)
        return self._stream(states, row, max_new_tokens, Sampler(temperature, top_p, seed), frozenset(stop_ids))

    @torch.no_grad()
    def _stream(
        self, states: VLMStates, row: int, max_new_tokens: int, sample: "Sampler", stop_ids: frozenset[int]
    ) -> Iterator[int]:
        columns = states.attention_mask[row].nonzero().flatten()
        cache = self._row_cache(states.past_key_values, row, columns)
        hidden = states.hidden_states[row, columns[-1]]
        position = int(states.attention_mask.shape[1] + states.rope_deltas[row])
        for step in range(max_new_tokens):
            token = sample(self.logits(hidden))
            if token in stop_ids:
                return
            yield token
            if step == max_new_tokens - 1:
                return
            output = self.model.model(
                input_ids=torch.tensor([[token]], device=self.device),
                position_ids=torch.full((3, 1, 1), position + step, device=self.device),
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output.last_hidden_state[0, -1]

    def _row_cache(self, past_key_values: Any, row: int, columns: Tensor) -> Any:
        """A cache of one sample alone, without its padding."""
        rows, columns = slice(row, row + 1), columns.to(self.device)
        layers = past_key_values.layers
        return self._cache((layer.keys[rows, :, columns], layer.values[rows, :, columns]) for layer in layers)

    def _cache(self, layers: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """A cache that may grow without the one whose keys and values it begins with."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config.text_config)
        for i, (keys, values) in enumerate(layers):
            cache.update(keys, values, i)
        return cache


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    if not 0 <= temperature <= 100:
        raise ValueError(f"temperature={temperature}: must be from 0 to 100")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0, at most 1")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")


class Sampler:
    """Draws tokens on the CPU in fp32, so that one seed gives one text on every device."""

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """Logits [V] -> a token id."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.float().cpu() / self.temperature).softmax(0)
        sorted_, order = probabilities.sort(descending=True)
        # A token stays when the likelier ones together hold less than top_p; the likeliest always does.
        sorted_ = sorted_ * (sorted_.cumsum(0) - sorted_ < self.top_p)
        return int(order[torch.multinomial(sorted_, 1, generator=self.generator)])
