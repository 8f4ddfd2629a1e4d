"""Attention in fp32 under autocast: which models take it, its values and gradients."""

import pytest
import torch

from uniworld.kernels import extension
from uniworld.train.parts import attention
from uniworld.train.parts.attention import KEEPING, NAME, keep_scores, kept_scores, use_fast_attention


@pytest.fixture
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).train()


@pytest.fixture
def slow_in_bf16(monkeypatch):
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def loss_and_gradient(model, *, autocast):
    """Of two sequences, one of them padded on the left."""
    ids = torch.arange(24).view(2, 12) % 50
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()


@pytest.mark.usefixtures("slow_in_bf16")
def test_without_autocast_it_is_sdpa(model):
    expected = loss_and_gradient(model, autocast=False)
    use_fast_attention(model)
    assert model.config._attn_implementation == NAME
    for ours, plain in zip(loss_and_gradient(model, autocast=False), expected):
        assert torch.equal(ours, plain)


@pytest.mark.usefixtures("slow_in_bf16")
def test_under_autocast_it_runs_in_fp32(model, monkeypatch):
    seen, plain = [], attention.sdpa_attention_forward

    def spy(module, query, *rest, **options):
        seen.append(query.dtype)
        return plain(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    truth, bf16 = (loss_and_gradient(model, autocast=autocast) for autocast in (False, True))
    use_fast_attention(model)
    ours = loss_and_gradient(model, autocast=True)
    assert seen == [torch.float32] * 2
    for a, b, exact in zip(ours, bf16, truth):
        chance = 1e-6 if exact.dim() else 1e-4  # of the loss, one number of about 4, bf16's error may be next to none
        assert (a - exact).norm() <= 1.1 * (b - exact).norm() + chance


def test_amx_keeps_torchs_own(model, monkeypatch):
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset({"amx_bf16"}))
    use_fast_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.usefixtures("slow_in_bf16")
def test_kept_scores_are_those_that_are_attended_by(model, fast):
    """Of one head in each of two layers, against the weights of transformers' own attention in plain products."""
    ids = torch.arange(24).view(2, 12) % 50
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    if fast:
        use_fast_attention(model)
    keep_scores(model, model.model.layers, {0: 3, 1: 1})
    assert model.config._attn_implementation == (NAME if fast else KEEPING)
    logits = model(input_ids=ids).logits
    for layer, head in ((0, 3), (1, 1)):
        scores = kept_scores(model.model.layers[layer])
        weights = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        assert torch.allclose(weights, expected[layer][:, head], atol=1e-6)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits, model(input_ids=ids).logits)
