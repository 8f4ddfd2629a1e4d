"""The gradient of the "cpu_bf16" backend: against fp64 and torch's own bf16 error, padding, threads, compile."""

import pytest
import torch
import torch.nn.functional as F

from uniworld.kernels import attention_bf16
from uniworld.kernels.joint_attention import joint_attention

WHY_NOT = attention_bf16.why_missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def make_inputs(B, S, H, Dh, scale=1.0):
    """q, k, v as views of one fused projection, and the gradient of what comes out."""
    torch.manual_seed(0)
    q, k, v = torch.randn(B, S, 3, H, Dh).bfloat16().unbind(2)
    return q * scale, k, v, torch.randn(B, S, H, Dh).bfloat16()


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(q, k, v, dout, lengths=None):
    inputs = leaves(q, k, v)
    return torch.autograd.grad(joint_attention(*inputs, lengths=lengths, backend="cpu_bf16"), inputs, dout)


def torch_gradients(q, k, v, dout):
    inputs = leaves(q, k, v)
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in inputs)).transpose(1, 2)
    return torch.autograd.grad(out, inputs, dout)


def gradients_fp64(q, k, v, dout):
    q, k, v = leaves(*(t.double() for t in (q, k, v)))
    weights = (torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.autograd.grad(torch.einsum("bhst,bthd->bshd", weights, v), (q, k, v), dout.double())


def assert_close_to_fp64(q, k, v, dout):
    """The mean error of each gradient is at most 1.2 times that of torch's own in bf16."""
    found = zip(gradients(q, k, v, dout), torch_gradients(q, k, v, dout), gradients_fp64(q, k, v, dout))
    for ours, theirs, truth in found:
        assert ours.shape == truth.shape and ours.dtype == torch.bfloat16
        error, allowed = ((x.double() - truth).square().mean() for x in (ours, theirs))
        assert error <= 1.2**2 * allowed + 1e-12


@pytest.mark.parametrize("Dh", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("S", [1, 7, 65, 333])
def test_matches_fp64(S, Dh):
    assert_close_to_fp64(*make_inputs(2, S, 3, Dh))


@pytest.mark.parametrize("scale", [5.0, 40.0])
def test_large_logits(scale):
    """Scores in the hundreds, where nearly all the weight is on one key."""
    assert_close_to_fp64(*make_inputs(2, 200, 2, 64, scale))


def test_values_that_are_known():
    """Equal scores share a gradient out evenly; one token alone passes it on, and has none of its own scores."""
    q, k, v, dout = make_inputs(1, 64, 1, 32)
    dq, dk, dv = gradients(torch.zeros_like(q), k, v, torch.ones_like(dout))
    assert torch.all(dv == 1) and torch.all(dk == 0)
    q, k, v, dout = make_inputs(2, 1, 2, 32)
    dq, dk, dv = gradients(q, k, v, dout)
    assert torch.equal(dv, dout) and dq.abs().max() < 1e-6 and dk.abs().max() < 1e-6


def test_any_strides():
    """Heads first, every other token, an odd address; a gradient that is one number for all."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 100, 64).bfloat16().transpose(1, 2)
    k = torch.randn(2, 200, 3, 64).bfloat16()[:, ::2]
    v = torch.randn(2 * 100 * 3 * 64 + 1).bfloat16()[1:].view(2, 100, 3, 64)
    for dout in (torch.randn(2, 3, 64, 100).bfloat16().permute(0, 3, 1, 2), torch.ones(()).bfloat16().expand(v.shape)):
        views = [t.requires_grad_() for t in (q, k, v)]
        found = torch.autograd.grad(joint_attention(*views, backend="cpu_bf16"), views, dout)
        for x, y in zip(found, gradients(q, k, v, dout.contiguous())):
            assert torch.equal(x, y)


@pytest.mark.parametrize("lengths", [(333, 1, 50), (60, 60, 60)], ids=str)
def test_padded_batch_equals_each_sample_alone(lengths):
    """Bit for bit, although the padding holds NaN, also in the gradient that comes in; the padding gets zeros."""
    inputs = make_inputs(3, 333, 2, 96)
    alone = [gradients(*(t[b : b + 1, :n] for t in inputs)) for b, n in enumerate(lengths)]
    inputs = [t.clone() for t in inputs]
    for b, n in enumerate(lengths):
        for t in inputs:
            t[b, n:] = float("nan")
    for i, together in enumerate(gradients(*inputs, lengths)):
        for b, n in enumerate(lengths):
            assert torch.equal(together[b, :n], alone[b][i][0]) and torch.all(together[b, n:] == 0)


def test_bits_do_not_depend_on_threads():
    inputs = make_inputs(2, 333, 3, 64)
    before = torch.get_num_threads()
    try:
        found = [(torch.set_num_threads(n), gradients(*inputs))[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(*found):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_only_what_is_wanted_gets_a_gradient():
    q, k, v, dout = make_inputs(1, 40, 2, 32)
    v.requires_grad_()
    (dv,) = torch.autograd.grad(joint_attention(q, k, v, backend="cpu_bf16"), v, dout)
    assert torch.equal(dv, gradients(q, k, v.detach(), dout)[2])


@pytest.mark.parametrize("lengths", [None, (9, 40)], ids=str)
def test_compiles_without_graph_break(lengths):
    torch._dynamo.reset()
    q, k, v, dout = make_inputs(2, 40, 2, 64)
    inputs = leaves(q, k, v)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs, lengths=lengths, backend="cpu_bf16"), inputs, dout)
    for x, y in zip(found, gradients(q, k, v, dout, lengths)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("lengths", [None, (40, 40)], ids=str)
def test_opcheck(lengths):
    inputs = leaves(*make_inputs(2, 40, 2, 64)[:3])
    torch.library.opcheck(torch.ops.uniworld.attention_bf16, (*inputs, lengths))
