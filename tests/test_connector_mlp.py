"""connector_mlp and gelu_linear beyond what test_kernels.py asks of every op: scattering, frozen weights, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from uniworld.kernels import linear_epilogue
from uniworld.kernels.connector_mlp import connector_mlp
from uniworld.kernels.extension import HAS_ONEDNN
from uniworld.kernels.gelu_linear import gelu_linear
from uniworld.kernels.registry import INTERPRET, use_backend

K, C, N = 24, 40, 16
BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN")),
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def weights(dtype=torch.float32, seed=0, in_features=K):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (C, in_features), "b1": (C,), "w2": (N, C), "b2": (N,)}
    return {name: torch.randn(s, generator=generator).to(dtype) * 0.3 for name, s in shapes.items()}


def by_modules(x, w):
    """The same MLP out of torch.nn modules, in fp64."""
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], C), torch.nn.SiLU(), torch.nn.Linear(C, N)).double()
    net.load_state_dict({"0.weight": w["w1"], "0.bias": w["b1"], "2.weight": w["w2"], "2.bias": w["b2"]})
    with torch.no_grad():
        return net(x.double())


def test_two_connectors_fill_one_sequence_in_place(backend):
    x, y = torch.randn(9, K), torch.randn(6, 10)
    first, second = weights(seed=1), weights(seed=2, in_features=10)
    rows_x = torch.tensor([0, 1, 2, 9, 10, 11, -1, 15, 16])
    rows_y = torch.tensor([3, 4, 5, 6, 7, 8])
    buffer = torch.full((2, 18, N + 4), 7.0)
    out = buffer[1, :, :N]  # a strided view: what lies around it must stay
    with torch.no_grad():
        result = connector_mlp(x, **first, rows=rows_x, out=out)
        assert result is out
        connector_mlp(y, **second, rows=rows_y, out=out)
    expected = torch.full((18, N), 7.0, dtype=torch.float64)
    for t, row in enumerate(rows_x.tolist()):
        if row >= 0:
            expected[row] = by_modules(x, first)[t]
    for t, row in enumerate(rows_y.tolist()):
        expected[row] = by_modules(y, second)[t]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.all(buffer[0] == 7) and torch.all(buffer[1, :, N:] == 7)


def test_rows_nobody_writes_are_zero(backend):
    x, w = torch.randn(3, K), weights()
    result = connector_mlp(x, **w, rows=torch.tensor([4, -1, 0]), num_rows=6)
    torch.testing.assert_close(result[[4, 0]].double(), by_modules(x, w)[[0, 2]], rtol=1e-5, atol=1e-5)
    assert torch.all(result[[1, 2, 3, 5]] == 0)


def test_rows_none_fills_from_the_top(backend):
    x, w = torch.randn(3, K), weights()
    result = connector_mlp(x, **w, num_rows=5)
    torch.testing.assert_close(result[:3].double(), by_modules(x, w), rtol=1e-5, atol=1e-5)
    assert torch.all(result[3:] == 0)


@pytest.mark.parametrize("rows", [None, torch.empty(0, dtype=torch.int64)], ids=["plain", "scattered"])
def test_no_input_rows(backend, rows):
    x, w = torch.empty(0, K, requires_grad=True), {n: t.requires_grad_() for n, t in weights().items()}
    result = connector_mlp(x, **w, rows=rows, num_rows=4)
    assert torch.equal(result, torch.zeros(4, N))
    gradients = torch.autograd.grad(result.sum(), [x, *w.values()])
    assert all(torch.all(g == 0) for g in gradients) and gradients[0].shape == (0, K)


@pytest.mark.parametrize("rows", [None, [5, -1, 0, 2, -1, 7, 1]], ids=["plain", "scattered"])
def test_gradients_with_a_base(backend, rows):
    """Where gradients are needed the base is not touched, and its gradient is zero in the rows overwritten."""
    rows = None if rows is None else torch.tensor(rows)
    generator = torch.Generator().manual_seed(3)
    tensors = {"x": torch.randn(7, K, generator=generator), **weights(), "out": torch.randn(9, N, generator=generator)}
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    dy = torch.randn(9, N, generator=generator)
    ours = connector_mlp(**leaves, rows=rows)
    assert torch.equal(leaves["out"], tensors["out"])
    exact = {n: t.double().requires_grad_() for n, t in tensors.items()}
    hidden = F.silu(exact["x"] @ exact["w1"].T + exact["b1"])
    y = hidden @ exact["w2"].T + exact["b2"]
    targets = list(range(7)) if rows is None else rows.tolist()
    lines = [y[targets.index(r)] if r in targets else exact["out"][r] for r in range(9)]
    truth = torch.stack(lines)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    a = torch.autograd.grad(ours, list(leaves.values()), dy)
    b = torch.autograd.grad(truth, list(exact.values()), dy.double())
    for name, x, t in zip(leaves, a, b):
        torch.testing.assert_close(x.double(), t, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def backward_calls(result):
    with CountCalls() as calls:
        result.sum().backward()
    return calls.names


def test_frozen_weights_get_no_gradient_work():
    with use_backend("cpp" if HAS_ONEDNN else "triton"):
        w = weights()
        w["b2"].requires_grad_()
        names = backward_calls(connector_mlp(torch.randn(5, K), **w))
        assert not any("connector_mlp" in n or "mm" in n for n in names), names
        w["w2"].requires_grad_()
        names = backward_calls(connector_mlp(torch.randn(5, K), **w))
        assert "uniworld::connector_mlp_hidden" in names and names.count("aten::mm") == 1, names
        w["w1"].requires_grad_()  # dhidden, dw1, dw2; no dx
        names = backward_calls(connector_mlp(torch.randn(5, K), **w))
        assert "uniworld::connector_mlp_hidden_backward" in names and names.count("aten::mm") == 3, names
        x = torch.randn(5, K, requires_grad=True)  # as in a frozen DiT: only dx
        names = backward_calls(gelu_linear(x, torch.randn(N, K), torch.randn(N)))
        products = [n for n in names if n.split(".")[0] in ("aten::mm", "aten::addmm", "aten::linear")]
        assert products == ["aten::mm"], names  # and none to make the pre-activation anew


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_with_a_base(in_place):
    torch._dynamo.reset()
    w, rows = weights(), torch.tensor([3, -1, 1])
    x, base = torch.randn(3, K), torch.randn(6, N)
    if not in_place:
        w["w1"].requires_grad_()

    def run(x, base):
        base = base.clone()
        return connector_mlp(x, **w, rows=rows, out=base) * 2, base

    with use_backend("cpp" if HAS_ONEDNN else "triton"):
        compiled, eager = torch.compile(run, fullgraph=True, backend="aot_eager")(x, base), run(x, base)
    torch.testing.assert_close(compiled, eager)
    assert torch.equal(eager[1], base) is not in_place


def test_refuses_what_does_not_fit(backend):
    x, w = torch.randn(3, K), weights()
    rows = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"w2=\(16, 39\) torch.float32: must be \(16, 40\)"):
        connector_mlp(x, w["w1"], w["b1"], w["w2"][:, 1:], w["b2"])
    with pytest.raises(ValueError, match="b1=.*torch.bfloat16: must be"):
        connector_mlp(x, **(w | {"b1": w["b1"].bfloat16()}))
    with pytest.raises(ValueError, match="num_rows=None: must be given with rows"):
        connector_mlp(x, **w, rows=rows)
    with pytest.raises(ValueError, match="num_rows=2: must be at least the 3 rows of x"):
        connector_mlp(x, **w, num_rows=2)
    with pytest.raises(ValueError, match=r"rows=\(3,\) torch.int32: must be \(3,\) torch.int64"):
        connector_mlp(x, **w, rows=rows.int(), num_rows=4)
    with pytest.raises(ValueError, match=r"out=\(4, 15\).*must be \[R, 16\]"):
        connector_mlp(x, **w, rows=rows, out=torch.zeros(4, 15))
    with pytest.raises(ValueError, match=r"num_rows=5: must be that of out, 4"):
        connector_mlp(x, **w, rows=rows, out=torch.zeros(4, N), num_rows=5)
    with pytest.raises(ValueError, match=r"weight=\(16, 24\): must be \(16, 25\)"):
        gelu_linear(torch.randn(3, 25), torch.randn(16, 24), torch.randn(16))


def test_a_row_outside_the_result_is_refused_on_the_cpu():
    with use_backend("cpp" if HAS_ONEDNN else "torch"), pytest.raises((ValueError, IndexError), match="rows=4|range"):
        connector_mlp(torch.randn(2, K), **weights(), rows=torch.tensor([0, 4]), num_rows=4)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_without_onednn_bf16_the_result_is_the_same(monkeypatch, activation):
    """A CPU without AVX-512 takes the two-pass path."""
    x, w, b = torch.randn(9, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    fused = linear_epilogue.linear_onednn(x, w, b, activation)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert (fused - linear_epilogue.linear_onednn(x, w, b, activation)).abs().max() < 0.1


def test_the_result_does_not_depend_on_the_tile(monkeypatch):
    """More tiles than one in each direction, and a group of row tiles that is not full."""
    if not INTERPRET:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(linear_epilogue, "INTERPRETER_TILE", (16, 16, 16, 4, 1))
    x, w, b = torch.randn(16 * 11 + 3, 33), torch.randn(50, 33), torch.randn(50)
    with use_backend("triton"):
        y = gelu_linear(x, w, b)
    truth = F.gelu(F.linear(x.double(), w.double(), b.double()), approximate="tanh")
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
