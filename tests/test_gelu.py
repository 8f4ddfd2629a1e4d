"""gelu: C++ against fp64 and torch's own error, on every instruction set; edges, strides, compile."""

import pytest
import torch
import torch.nn.functional as F

from uniworld.kernels import extension
from uniworld.kernels.gelu import gelu
from uniworld.kernels.registry import use_backend

pytestmark = pytest.mark.skipif(not extension.has("gelu"), reason="needs the C++ core")


@pytest.fixture(params=[2, 1, 0], ids=["avx512", "avx2", "baseline"])
def instruction_set(request):
    before = extension.core().limit_instruction_set(request.param)
    yield
    extension.core().limit_instruction_set(before)


def value_and_gradient(function, x, dout):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, dout)


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 37, 70), (40, 96)], ids=str)
def test_matches_fp64(shape, dtype):
    """No farther than torch's own, of which the fp32 one is off by 4e-7 and the gradient by 3e-6, or than 1e-6."""
    torch.manual_seed(0)
    x, dout = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)
    ours, theirs = (value_and_gradient(function, x, dout) for function in (gelu, torch_gelu))
    truth = value_and_gradient(torch_gelu, x.double(), dout.double())
    for a, b, exact in zip(ours, theirs, truth):
        assert a.dtype == dtype and a.shape == x.shape
        assert (a.double() - exact).abs().max() <= 1.01 * (b.double() - exact).abs().max() + 1e-6


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bf16_number(dtype):
    """All 65,536 of them: what is finite as in fp64, NaN stays, infinities go to themselves and to 0."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    ours = value_and_gradient(gelu, x, torch.ones_like(x))
    truth = value_and_gradient(torch_gelu, x.double().clamp(-1e18, 1e18), torch.ones(len(x), dtype=torch.float64))
    finite = x.isfinite() & (x.abs() < 1e18)
    for a, exact in zip(ours, truth):
        assert torch.all(a[x.isnan()].isnan())
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
        assert torch.all((a.double() - exact)[finite].abs() <= rounding * exact[finite].abs() + 1e-6)
    huge = x.abs() >= 1e18
    assert torch.all(ours[0][huge & (x > 0)] == x[huge & (x > 0)])
    assert torch.all(ours[0][huge & (x < 0) & x.isfinite()].abs() <= 3e-38 * x[huge & (x < 0) & x.isfinite()].abs())


def test_any_strides():
    torch.manual_seed(0)
    x, dout = torch.randn(8, 30, 6).transpose(0, 1)[::2], torch.randn(6, 8, 15).permute(2, 1, 0)
    found, expected = (value_and_gradient(gelu, a, b) for a, b in ((x, dout), (x.contiguous(), dout.contiguous())))
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_empty_and_scalar():
    assert gelu(torch.zeros(0, 4)).shape == (0, 4)
    assert gelu(torch.tensor(0.0)) == 0


def test_torch_serves_what_the_core_does_not():
    x = torch.randn(5, dtype=torch.float64)
    assert torch.equal(gelu(x), torch_gelu(x))
    with use_backend("torch"):
        assert torch.equal(gelu(x.float()), torch_gelu(x.float()))


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    x = torch.randn(3, 20, requires_grad=True)
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, gelu)))


def test_opcheck():
    torch.library.opcheck(torch.ops.uniworld.gelu, (torch.randn(3, 20, requires_grad=True),))
