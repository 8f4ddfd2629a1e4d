"""The elementwise ops of the DiT against diffusers' and torch's own modules, and what they refuse."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous

from uniworld.kernels.adaln_modulate import adaln_modulate
from uniworld.kernels.gate_residual import gate_residual, gate_residual_adaln
from uniworld.kernels.qk_norm_rope import qk_norm_rope
from uniworld.kernels.registry import INTERPRET, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["auto", "triton"] if INTERPRET else ["auto"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def test_adaln_modulate_is_diffusers_norm():
    torch.manual_seed(0)
    norm = AdaLayerNormContinuous(48, 48, elementwise_affine=False, eps=1e-6).to(DEVICE)
    x, vec = randn(2, 5, 48), randn(2, 48)
    table = norm.linear(norm.silu(vec))
    scale, shift = table.chunk(2, dim=1)  # views with a row stride of 96
    torch.testing.assert_close(adaln_modulate(x, scale, shift), norm(x, vec), rtol=1e-5, atol=1e-5)


def test_rows_far_from_zero_keep_their_variance():
    x = randn(1, 4, 96) + 1000
    zeros = torch.zeros(1, 96, device=DEVICE)
    expected = torch.nn.functional.layer_norm(x.double(), (96,), eps=1e-6)
    torch.testing.assert_close(adaln_modulate(x, zeros, zeros).double(), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("text", [0, 6])
def test_qk_norm_rope_is_diffusers_attention(text):
    torch.manual_seed(0)
    B, L, R, H, Dh = 2, 10, 7 if not text else 10, 3, 32
    qkv, txt = randn(B, L, 3 * H * Dh), randn(B, text, 3 * H * Dh)
    norms = [torch.nn.RMSNorm(Dh, eps=1e-6, device=DEVICE) for _ in range(4)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    weights = [norm.weight.detach() for norm in norms]
    angle = randn(R, Dh // 2)
    heads = [part.unflatten(-1, (H, Dh)) for part in (*qkv.chunk(3, -1), *txt.chunk(3, -1))]
    q = torch.cat([norms[0](heads[0]), norms[2](heads[3])], dim=1)
    k = torch.cat([norms[1](heads[1]), norms[3](heads[4])], dim=1)
    table = (angle.cos().repeat_interleave(2, dim=1), angle.sin().repeat_interleave(2, dim=1))
    q, k = (torch.cat([apply_rotary_emb(x[:, :R], table, sequence_dim=1), x[:, R:]], dim=1) for x in (q, k))
    second = (txt, weights[2], weights[3]) if text else ()
    ours = qk_norm_rope(qkv, weights[0], weights[1], angle.cos(), angle.sin(), *second, num_heads=H)
    for result, expected in zip(ours, (q, k, torch.cat([heads[2], heads[5]], dim=1))):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_values_are_a_view_unless_gradients_are_asked_for():
    qkv, weight, table = randn(1, 4, 3 * 2 * 16), torch.ones(16, device=DEVICE), torch.ones(4, 8, device=DEVICE)
    _, _, v = qk_norm_rope(qkv, weight, weight, table, table, num_heads=2)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert torch.equal(v, qkv[..., 64:].unflatten(-1, (2, 16)))
    _, _, v = qk_norm_rope(qkv.requires_grad_(), weight, weight, table, table, num_heads=2)
    (gradient,) = torch.autograd.grad(v.sum(), qkv)
    assert torch.equal(gradient[..., 64:], torch.ones_like(gradient[..., 64:])) and not gradient[..., :64].any()


def test_norm_weights_alone_get_gradients():
    qkv, table = randn(1, 4, 3 * 2 * 16), torch.ones(4, 8, device=DEVICE)
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    q, _, _ = qk_norm_rope(qkv, weight, weight.detach(), table, table * 0, num_heads=2)
    (gradient,) = torch.autograd.grad(q.sum(), weight)
    normed = torch.nn.functional.rms_norm(qkv[..., :32].unflatten(-1, (2, 16)), (16,), eps=1e-6)
    torch.testing.assert_close(gradient, normed.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


def test_empty_text_changes_nothing():
    qkv, weight, table = randn(1, 4, 3 * 2 * 16), torch.ones(16, device=DEVICE), randn(4, 8)
    alone = qk_norm_rope(qkv, weight, weight, table, table, num_heads=2)
    joint = qk_norm_rope(qkv, weight, weight, table, table, qkv[:, :0], weight, weight, num_heads=2)
    for a, b in zip(alone, joint):
        assert torch.equal(a, b)


def test_gradients_have_the_same_bits_every_run():
    x, y = randn(2, 40, 64).requires_grad_(), randn(2, 40, 64)
    gate, scale, shift = (randn(2, 64).requires_grad_() for _ in range(3))

    def gradients():
        residual, modulated = gate_residual_adaln(x, y, gate, scale, shift)
        return torch.autograd.grad((residual * modulated).sum(), (x, gate, scale, shift))

    for first, second in zip(gradients(), gradients()):
        assert torch.equal(first, second)


def test_refuses_what_does_not_fit():
    x, vector = randn(2, 5, 64), randn(2, 64)
    with pytest.raises(ValueError, match=r"shift=\(1, 64\): must be \(2, 64\)"):
        adaln_modulate(x, vector, vector[:1])
    with pytest.raises(ValueError, match=r"scale: torch.bfloat16 on"):
        adaln_modulate(x, vector.bfloat16(), vector)
    with pytest.raises(ValueError, match=r"y=\(2, 4, 64\)"):
        gate_residual(x, x[:, 1:], vector)
    weight, table = torch.ones(16, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    qkv = randn(2, 5, 3 * 2 * 16)
    with pytest.raises(ValueError, match=r"cos=\(6, 8\)"):
        qk_norm_rope(qkv, weight, weight, randn(6, 8), randn(6, 8), num_heads=2)
    with pytest.raises(ValueError, match=r"img_k_weight=\(8,\): must be \(16,\)"):
        qk_norm_rope(qkv, weight, weight[:8], table, table, num_heads=2)
    with pytest.raises(ValueError, match=r"txt_q_weight=None: must be \(16,\)"):
        qk_norm_rope(qkv, weight, weight, table, table, qkv, num_heads=2)
    with pytest.raises(ValueError, match=r"num_heads=5"):
        qk_norm_rope(qkv, weight, weight, table, table, num_heads=5)
