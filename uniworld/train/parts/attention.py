"""Attention of transformers' models in fp32 under autocast, where that is faster: a CPU without AMX.

torch's CPU kernel has fast products in bf16 only with AMX. Without it, forward and backward of 8 sequences of 184
tokens with 7 heads of 32 take 23.4 ms in bf16 and 11.0 in fp32 on one core of an EPYC with AVX512-BF16 (2026-11-29).
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from uniworld.kernels import extension

NAME = "sdpa_fp32"


def sdpa_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' "sdpa" of fp32 copies; q, k, v [B, H, S, Dh], returns [B, S, H, Dh] in the dtype of q."""
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), None


AttentionInterface.register(NAME, sdpa_fp32)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_attention(model: PreTrainedModel) -> None:
    """Let a model that is trained on this CPU attend in fp32, unless its torch is fast in bf16."""
    if not torch.cuda.is_available() and "amx_bf16" not in extension.CPU_FEATURES:
        model.set_attn_implementation(NAME)
