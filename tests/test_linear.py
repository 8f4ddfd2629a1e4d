"""linear: the bias inside the GEMM, against fp64 and F.linear; where it is used and where it is not."""

import pytest
import torch
import torch.nn.functional as F

from uniworld.kernels import extension
from uniworld.kernels.linear import _forward_op, fuses_bias, linear
from uniworld.kernels.registry import use_backend
from uniworld.models.blocks import Linear
from uniworld.models.quantized import linear_of_pair

needs_onednn = pytest.mark.skipif(not extension.has("onednn"), reason="this torch has no oneDNN")


def make_inputs(*shape, N=48, dtype=torch.bfloat16):
    torch.manual_seed(0)
    K = shape[-1]
    return torch.randn(shape).to(dtype), (torch.randn(N, K) * K**-0.5).to(dtype), torch.randn(N).to(dtype)


def error(y, x, weight, bias):
    truth = F.linear(x.double(), weight.double(), bias.double())
    return (y.double() - truth).norm() / truth.norm()


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 40), (2, 37, 64), (3, 0, 32), (33,)], ids=str)
@torch.no_grad()
def test_matches_fp64(shape):
    x, weight, bias = make_inputs(*shape)
    assert fuses_bias(x, weight, bias)
    y = linear(x, weight, bias)
    assert y.dtype == torch.bfloat16 and y.shape == (*shape[:-1], 48)
    if x.numel():
        assert error(y, x, weight, bias) <= 1.05 * error(F.linear(x, weight, bias), x, weight, bias)


@needs_onednn
@torch.no_grad()
def test_any_strides():
    """Rows of a longer sequence and a part of a weight, as `linear_of_pair` and the joint sequence have them."""
    x, weight, bias = make_inputs(2, 30, 64)
    parts = x[:, 5:20, :40], weight[:, :40], bias
    assert torch.equal(linear(*parts), linear(*(t.contiguous() for t in parts)))


@needs_onednn
@torch.no_grad()
def test_a_pair_is_one_product_without_amx(monkeypatch):
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset())
    x, weight, bias = make_inputs(2, 37, 64)
    y = linear_of_pair(x[..., :24], x[..., 24:], weight, bias)
    assert torch.equal(y, linear(x, weight, bias))
    with use_backend("torch"):
        plain = linear_of_pair(x[..., :24], x[..., 24:], weight, bias)
    assert not torch.equal(y, plain)
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset({"amx_bf16"}))
    assert torch.equal(linear_of_pair(x[..., :24], x[..., 24:], weight, bias), plain)
    assert error(y, x, weight, bias) <= error(plain, x, weight, bias)


@needs_onednn
def test_gradients_of_a_pair(monkeypatch):
    """One product's, at least as near to fp64 as those of two."""
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset())
    x, weight, bias = (t.requires_grad_() for t in make_inputs(2, 37, 64))
    dout = torch.randn(2, 37, len(bias)).bfloat16()

    def gradients(*inputs):
        out = linear_of_pair(inputs[0][..., :24], inputs[0][..., 24:], *inputs[1:])
        return torch.autograd.grad(out, inputs, dout.to(out.dtype))

    ours = gradients(x, weight, bias)
    truth = gradients(*(t.detach().double().requires_grad_() for t in (x, weight, bias)))
    with use_backend("torch"):
        plain = gradients(x, weight, bias)
    for a, b, exact in zip(ours, plain, truth):
        assert (a.double() - exact).norm() <= 1.01 * (b.double() - exact).norm()


def test_not_where_a_gradient_is_needed_nor_in_another_dtype():
    x, weight, bias = make_inputs(5, 64)
    weight.requires_grad_()
    assert not fuses_bias(x, weight, bias)
    linear(x, weight, bias).sum().backward()
    assert weight.grad.shape == weight.shape
    with torch.no_grad():
        assert not fuses_bias(*(t.float() for t in (x, weight, bias)))
        assert not fuses_bias(x, weight.float(), bias)
        with use_backend("torch"):
            assert not fuses_bias(x, weight, bias)


@needs_onednn
@torch.no_grad()
def test_compiles_without_graph_break_and_passes_opcheck():
    torch._dynamo.reset()
    x, weight, bias = make_inputs(2, 5, 64)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), linear(x, weight, bias))
    torch.library.opcheck(_forward_op, (x, weight, bias))


@needs_onednn
def test_the_module_is_a_linear():
    module = Linear(64, 48).bfloat16()
    assert isinstance(module, torch.nn.Linear) and set(module.state_dict()) == {"weight", "bias"}
    x = make_inputs(3, 64)[0]
    with torch.no_grad():
        assert torch.equal(module(x), _forward_op(x, module.weight, module.bias))
    assert module(x).requires_grad
