"""Attention of transformers' models in fp32 under autocast, where that is faster: a CPU without AMX. And the scores of
heads that are told where to look.

torch's CPU kernel has fast products in bf16 only with AMX. Without it, forward and backward of 8 sequences of 184
tokens with 7 heads of 32 take 23.4 ms in bf16 and 11.0 in fp32 on one core of an EPYC with AVX512-BF16 (2026-11-29).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from uniworld.kernels import extension

NAME, KEEPING = "sdpa_fp32", "sdpa_keeping"


def sdpa_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' "sdpa" of fp32 copies; q, k, v [B, H, S, Dh], returns [B, S, H, Dh] in the dtype of q."""
    _keep(module, query, key, **options)
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), None


def sdpa_keeping(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' "sdpa", which keeps what `keep_scores` says."""
    _keep(module, query, key, **options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


for name, attend in ((NAME, sdpa_fp32), (KEEPING, sdpa_keeping)):
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)


def use_fast_attention(model: PreTrainedModel) -> None:
    """Let a model that is trained on this CPU attend in fp32, unless its torch is fast in bf16."""
    if not torch.cuda.is_available() and "amx_bf16" not in extension.CPU_FEATURES:
        model.set_attn_implementation(NAME)


def keep_scores(model: PreTrainedModel, layers: Sequence[nn.Module], heads: Mapping[int, int]) -> None:
    """From now on every pass keeps the queries and keys of head `heads[i]` of layer i, for `kept_scores`.

    layers: the model's decoder layers, whose attention is their `self_attn`.
    """
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(KEEPING)
    for i, head in heads.items():
        layers[i].self_attn.kept_head = head


def kept_scores(layer: nn.Module) -> Tensor:
    """What the kept head of a decoder layer made of each query and key in the last pass, before mask and softmax: fp32
    [B, S, S]."""
    query, key, scaling = layer.self_attn.kept
    with torch.autocast(query.device.type, enabled=False):
        return query.float() @ key.float().mT * scaling


def _keep(module: nn.Module, query: Tensor, key: Tensor, *, scaling: float | None = None, **_) -> None:
    """No products yet: most passes do without them."""
    head = getattr(module, "kept_head", None)
    if head is not None:
        group = query.shape[1] // key.shape[1]
        module.kept = query[:, head], key[:, head // group], query.shape[-1] ** -0.5 if scaling is None else scaling
