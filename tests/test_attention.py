"""joint_attention and its backends: against fp64, unequal lengths, gradients, choice of backend, calls of libraries."""

import math
import sys
import types

import pytest
import torch

from uniworld.kernels import attention_backends
from uniworld.kernels import joint_attention as joint_module
from uniworld.kernels.attention_backends import AttentionChoice, available_backends, choose_backend, load_library
from uniworld.kernels.joint_attention import joint_attention
from uniworld.kernels.registry import INTERPRET, use_backend

GPU = torch.cuda.is_available()
CPU_BACKENDS = ["sdpa", "math", "flash_sdpa"]
SHAPES = [  # B, S, H, Dh, lengths
    (1, 1, 1, 16, None),
    (2, 65, 3, 24, None),
    (2, 33, 2, 64, (20, 20)),
    (3, 77, 2, 40, (77, 1, 50)),
]


def make_qkv(B, S, H, Dh, dtype=torch.float32, device="cpu"):
    """Views of one fused projection, as the model has them."""
    torch.manual_seed(0)
    return torch.randn(B, S, 3, H, Dh, device=device).to(dtype).unbind(2)


def attention_fp64(q, k, v, lengths):
    """Written out sample by sample and head by head, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    q, k, v = (t.double() for t in (q, k, v))
    for b in range(q.shape[0]):
        n = lengths[b] if lengths else q.shape[1]
        for h in range(q.shape[2]):
            scores = q[b, :n, h] @ k[b, :n, h].T / math.sqrt(q.shape[3])
            out[b, :n, h] = torch.softmax(scores, dim=-1) @ v[b, :n, h]
    return out


def tolerance(dtype):
    return {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


@pytest.fixture(autouse=True)
def forget_choices():
    """Choices and imports are kept for a process; a test that changes what is installed must not leak."""
    yield
    choose_backend.cache_clear()
    load_library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "auto"])
def test_matches_fp64(backend, shape, dtype):
    *sizes, lengths = shape
    q, k, v = make_qkv(*sizes, dtype=dtype)
    out = joint_attention(q, k, v, lengths=lengths, backend=backend)
    assert out.dtype == dtype and out.shape == q.shape
    assert (out - attention_fp64(q, k, v, lengths)).abs().max() < tolerance(dtype)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_fp64(shape, dtype):
    *sizes, lengths = shape
    q, k, v = make_qkv(*sizes, dtype=dtype)
    with use_backend("triton"):
        out = joint_attention(q, k, v, lengths=lengths, backend="triton")
    assert (out - attention_fp64(q, k, v, lengths)).abs().max() < tolerance(dtype)


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, pytest.param("triton", marks=pytest.mark.skipif(
    not INTERPRET, reason="needs TRITON_INTERPRET=1"))])  # fmt: skip
@pytest.mark.parametrize("lengths", [(77, 1, 50), (60, 60, 60)], ids=str)
def test_padded_batch_equals_each_sample_alone(backend, lengths):
    """Bit for bit, although the padding holds NaN; and the rows of the padding are zero."""
    q, k, v = (t.clone() for t in make_qkv(3, 77, 2, 40))
    alone = [(q[b : b + 1, :n].clone(), k[b : b + 1, :n].clone(), v[b : b + 1, :n].clone())
             for b, n in enumerate(lengths)]  # fmt: skip
    for b, n in enumerate(lengths):
        for t in (q, k, v):
            t[b, n:] = float("nan")
    with use_backend("triton" if backend == "triton" else "auto"):
        out = joint_attention(q, k, v, lengths=lengths, backend=backend)
        for b, n in enumerate(lengths):
            assert torch.equal(out[b, :n], joint_attention(*alone[b], backend=backend)[0])
            assert torch.all(out[b, n:] == 0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [None, (9, 30), (17, 17)], ids=str)
def test_gradients_match_fp64(backend, lengths):
    inputs = [t.detach().clone().requires_grad_() for t in make_qkv(2, 30, 2, 24)]
    dy = torch.randn(2, 30, 2, 24)
    ours = torch.autograd.grad(joint_attention(*inputs, lengths=lengths, backend=backend), inputs, dy)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(attention_fp64(*exact, lengths), exact, dy.double())
    for name, a, b in zip("qkv", ours, truth):
        assert (a - b).abs().max() < 5e-6, name
        for sample, n in enumerate(lengths or ()):
            assert torch.all(a[sample, n:] == 0), f"padding of {name} got a gradient"


@pytest.mark.parametrize("backend", ["sdpa", "auto", "math"])
@pytest.mark.parametrize("lengths", [None, (9, 30), (17, 17)], ids=str)
def test_compiles_without_graph_break(backend, lengths):
    torch._dynamo.reset()
    q, k, v = (t.detach().clone().requires_grad_() for t in make_qkv(2, 30, 2, 24))
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    ours, plain = (f(q, k, v, lengths=lengths, backend=backend) for f in (compiled, joint_attention))
    torch.testing.assert_close(ours, plain)
    dy = torch.randn_like(plain)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(plain, (q, k, v), dy))


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_triton_compiles_without_graph_break():
    torch._dynamo.reset()
    q, k, v = make_qkv(2, 30, 2, 24)
    with use_backend("triton"), torch.no_grad():
        compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
        ours = compiled(q, k, v, lengths=(9, 30), backend="triton")
        torch.testing.assert_close(ours, joint_attention(q, k, v, lengths=(9, 30), backend="triton"))


def test_refuses_what_does_not_fit():
    q, k, v = make_qkv(2, 8, 2, 16)
    with pytest.raises(ValueError, match=r"lengths=\(8, 9\): must be 2 numbers in 1..8"):
        joint_attention(q, k, v, lengths=(8, 9))
    with pytest.raises(ValueError, match=r"lengths=\(0, 8\)"):
        joint_attention(q, k, v, lengths=(0, 8))
    with pytest.raises(ValueError, match=r"must equal q, \(2, 8, 2, 16\)"):
        joint_attention(q, k[:, :4], v)
    with pytest.raises(ValueError, match="attention='fast': must be one of auto, flash4"):
        joint_attention(q, k, v, backend="fast")
    with pytest.raises(ValueError, match="attention='cudnn': needs a CUDA device; available on cpu: .*sdpa"):
        joint_attention(q, k, v, backend="cudnn")


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
def test_triton_refuses_a_gradient():
    q, k, v = (t.detach().requires_grad_() for t in make_qkv(1, 8, 2, 16))
    with pytest.raises(ValueError, match="attention='triton': has no backward pass"):
        joint_attention(q, k, v, backend="triton")


# Choice of backend, on machines that are not here.

ALL = set(attention_backends.BACKENDS)
CHOICES = [  # capability, what is installed, what "auto" takes
    (9, ALL, "flash3"),
    (9, ALL - {"flash3"}, "flash4"),
    (9, ALL - {"flash3", "flash4"}, "cudnn"),
    (9, ALL - {"flash3", "flash4", "cudnn"}, "flash2"),
    (9, {"flash_sdpa", "sdpa", "math", "triton"}, "flash_sdpa"),
    (8, ALL - {"flash3", "flash4"}, "flash2"),
    (8, {"cudnn", "flash_sdpa", "sdpa", "math"}, "flash_sdpa"),
    (8, {"sdpa", "math"}, "sdpa"),
    (10, ALL - {"flash3"}, "flash4"),
    (12, {"cudnn", "flash_sdpa", "sdpa"}, "cudnn"),
    (7, {"sdpa", "math"}, "sdpa"),
]


def pretend(monkeypatch, major, installed):
    monkeypatch.setattr(attention_backends, "capability", lambda device: major)
    monkeypatch.setattr(attention_backends, "why_missing", lambda n, device: "" if n in installed else "not installed")
    choose_backend.cache_clear()


def short(value):
    """A test's name that is the same in every process, which the order of a set is not."""
    return str(sorted(value) if isinstance(value, set | frozenset) else value)[:40]


@pytest.mark.parametrize("major,installed,expected", CHOICES, ids=short)
def test_auto_takes_the_first_that_runs(monkeypatch, major, installed, expected):
    pretend(monkeypatch, major, installed)
    choice = choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128)
    assert choice.name == expected
    assert choice is choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128), "chosen once"
    passed = attention_backends.AUTO_ORDER.get(min(major, 10), ("sdpa",))
    for name in passed[: passed.index(expected)]:
        assert f"{name}: not installed" in choice.why


def test_auto_looks_at_dtype_and_head_dim(monkeypatch):
    pretend(monkeypatch, 9, ALL)
    assert choose_backend("auto", device="cuda", dtype=torch.float32, head_dim=128).name == "sdpa"
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=36).name == "sdpa"
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=512).name == "sdpa"


TORCH = {"cudnn", "flash_sdpa", "sdpa", "math"}
RAGGED_CHOICES = [  # capability, what is installed, what "auto" takes for all else, and for unequal lengths
    (9, ALL, "flash3", "flash3"),
    (9, ALL - {"flash3"}, "flash4", "flash2"),
    (9, ALL - {"flash3", "flash4", "flash2"}, "cudnn", "flash_sdpa"),
    (9, {"cudnn", "xformers", "sdpa", "triton"}, "cudnn", "xformers"),
    (9, {"cudnn", "sdpa", "math", "triton"}, "cudnn", "triton"),
    (9, {"cudnn", "sdpa", "math"}, "cudnn", ""),
    (8, TORCH | {"triton"}, "flash_sdpa", "flash_sdpa"),
    (10, ALL - {"flash3", "flash2"}, "flash4", "flash_sdpa"),
    (7, {"sdpa", "math"}, "sdpa", ""),
]


@pytest.mark.parametrize("major,installed,name,ragged", RAGGED_CHOICES, ids=short)
def test_auto_takes_one_call_for_unequal_lengths(monkeypatch, major, installed, name, ragged):
    pretend(monkeypatch, major, installed)
    choice = choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128)
    assert (choice.name, choice.ragged) == (name, ragged)


def test_an_older_torch_has_no_call_for_unequal_lengths(monkeypatch):
    pretend(monkeypatch, 9, {"cudnn", "flash_sdpa", "sdpa", "triton"})
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: None)
    assert choose_backend("auto", device="cuda", dtype=torch.bfloat16, head_dim=128).ragged == "triton"
    assert attention_backends.why_not_ragged("flash_sdpa", torch.device("cuda")) == "needs torch 2.10 or newer"


def test_unequal_lengths_keep_what_was_asked_for_and_what_suits(monkeypatch):
    """A backend asked for by name serves unequal lengths too, if need be once a sample; fp32 has nothing better."""
    pretend(monkeypatch, 9, ALL)
    for name in ("flash3", "flash2", "xformers", "triton"):
        assert choose_backend(name, device="cuda", dtype=torch.bfloat16, head_dim=128).ragged == name
    for name in ("cudnn", "flash4", "sdpa", "math"):
        assert choose_backend(name, device="cuda", dtype=torch.bfloat16, head_dim=128).ragged == ""
    assert choose_backend("auto", device="cuda", dtype=torch.float32, head_dim=128).ragged == ""
    assert choose_backend("sdpa", device="cpu", dtype=torch.float32, head_dim=128).ragged == ""


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unequal_lengths_in_triton_beside_another_backend(monkeypatch, dtype):
    """One launch for the batch, its values those of fp64; without our kernels, and for gradients, once a sample."""
    calls, attend = [], joint_module.attend
    monkeypatch.setattr(joint_module, "attend", lambda name, *qkv: calls.append(name) or attend(name, *qkv))
    choice, lengths = AttentionChoice("sdpa", "", ragged="triton"), (77, 1, 50)
    q, k, v = make_qkv(3, 77, 2, 40, dtype=dtype)
    exact = attention_fp64(q, k, v, lengths)
    for kernels, gradient, expected in (("triton", False, 0), ("torch", False, 3), ("triton", True, 3)):
        calls.clear()
        with use_backend(kernels):
            out = joint_attention(q.detach().requires_grad_(gradient), k, v, lengths=lengths, backend=choice)
        assert calls == ["sdpa"] * expected
        assert (out - exact).abs().max() < tolerance(dtype)
    calls.clear()
    joint_attention(q, k, v, lengths=(50, 50, 50), backend=choice)
    assert calls == ["sdpa"], "equal lengths are one call of the first choice"


def test_a_missing_backend_is_an_error_not_a_fallback(monkeypatch):
    pretend(monkeypatch, 9, {"cudnn", "sdpa"})
    with pytest.raises(ValueError, match="attention='flash3': not installed; available on cuda: cudnn, sdpa$"):
        choose_backend("flash3", device="cuda", dtype=torch.bfloat16, head_dim=128)
    with pytest.raises(ValueError, match="attention='cudnn': needs bfloat16 or float16, not torch.float32"):
        choose_backend("cudnn", device="cuda", dtype=torch.float32, head_dim=128)
    chosen = choose_backend("cudnn", device="cuda", dtype=torch.bfloat16, head_dim=128)
    assert chosen == AttentionChoice("cudnn", "requested")


def test_reports_every_backend_with_its_reason():
    found = available_backends("cpu")
    assert set(found) == ALL
    assert [name for name in CPU_BACKENDS if found[name]] == []
    assert found["flash2"] == "needs a CUDA device"


def test_an_import_error_is_the_reason(monkeypatch):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flash_attn":
                raise OSError("undefined symbol: _ZN3c10\nlong trace")

    monkeypatch.setattr(attention_backends, "capability", lambda device: 9)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    load_library.cache_clear()
    assert attention_backends.why_missing("flash2", torch.device("cuda")) == "undefined symbol: _ZN3c10"


# Calls of the libraries, with stand-ins that compute what the libraries document.


def install(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    for key, function in functions.items():
        if isinstance(function, types.FunctionType):
            function.__module__ = name
        setattr(module, key, function)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


def dense(q, k, v):
    return attention_fp64(q, k, v, None).to(q.dtype)


def flash3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None):
    """As flash_attn_interface documents it: sample b starts at cu_seqlens[b] and uses seqused[b] rows."""
    assert cu_seqlens_q.dtype == seqused_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert q.ndim == 3 and max_seqlen_q == max_seqlen_k and cu_seqlens_q[-1] == len(q)
    out = torch.full_like(q, float("nan"))
    for start, used, keys in zip(cu_seqlens_q[:-1].tolist(), seqused_q.tolist(), seqused_k.tolist()):
        rows, cols = slice(start, start + used), slice(start, start + keys)
        assert used == keys
        out[rows] = dense(q[None, rows], k[None, cols], v[None, cols])[0]
    return out


def packed_varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    """As flash_attn and torch.nn.attention.varlen document theirs: sequence i is the rows cu[i] to cu[i + 1]."""
    assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    starts = cu_q.tolist()
    assert starts[0] == 0 and starts[-1] == len(q) and q.ndim == 3
    longest = max(b - a for a, b in zip(starts, starts[1:]))
    assert max_q == max_k == longest and all(a < b for a, b in zip(starts, starts[1:]))
    return torch.cat([dense(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in zip(starts, starts[1:])])


class PaddedKeys:
    """As xformers documents BlockDiagonalPaddedKeysMask."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen, *, device=None):
        self = cls()
        self.q_seqlen, self.kv_padding, self.kv_seqlen = q_seqlen, kv_padding, kv_seqlen
        return self


def xformers_attention(q, k, v, attn_bias=None):
    if attn_bias is None:
        return dense(q, k, v)
    assert q.shape[0] == 1 and sum(attn_bias.q_seqlen) == q.shape[1]
    out, start = torch.empty_like(q), 0
    for b, (queries, keys) in enumerate(zip(attn_bias.q_seqlen, attn_bias.kv_seqlen)):
        first = b * attn_bias.kv_padding
        scores = torch.einsum("shd,thd->hst", q[0, start : start + queries], k[0, first : first + keys])
        weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
        out[0, start : start + queries] = torch.einsum("hst,thd->shd", weights, v[0, first : first + keys])
        start += queries
    return out


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins of all four libraries, on a machine where each would run."""
    install(monkeypatch, "flash_attn", flash_attn_func=lambda q, k, v: dense(q, k, v),
            flash_attn_varlen_func=packed_varlen)  # fmt: skip
    install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=packed_varlen)
    install(monkeypatch, "flash_attn.cute", flash_attn_func=lambda q, k, v: (dense(q, k, v), None))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=lambda q, k, v: dense(q, k, v),
            flash_attn_varlen_func=flash3_varlen)  # fmt: skip
    install(monkeypatch, "xformers")
    install(monkeypatch, "xformers.ops", memory_efficient_attention=xformers_attention)
    install(monkeypatch, "xformers.ops.fmha")
    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalPaddedKeysMask=PaddedKeys)
    monkeypatch.setattr(attention_backends, "why_missing", lambda n, d: load_library(n)[1])
    monkeypatch.setattr(attention_backends, "why_unsuited", lambda *a: "")
    choose_backend.cache_clear()
    load_library.cache_clear()


@pytest.mark.parametrize("lengths", [None, (33, 7, 20), (9, 9, 9)], ids=str)
@pytest.mark.parametrize("backend", ["flash4", "flash3", "flash2", "xformers"])
def test_calls_the_library(libraries, backend, lengths):
    q, k, v = make_qkv(3, 33, 2, 16)
    out = joint_attention(q, k, v, lengths=lengths, backend=backend)
    assert (out - attention_fp64(q, k, v, lengths)).abs().max() < 2e-6


@pytest.mark.parametrize("lengths", [(33, 7, 20), (1, 33, 32), (8, 9, 8)], ids=str)
@pytest.mark.parametrize("ragged", ["flash3", "flash2", "flash_sdpa", "xformers"])
def test_unequal_lengths_are_one_call(monkeypatch, libraries, ragged, lengths):
    """Beside a backend that has no such call; what stands in the padding reaches no valid row."""
    monkeypatch.setattr(joint_module, "attend", lambda *args: pytest.fail("a call of its own for a sample"))
    q, k, v = (t.clone() for t in make_qkv(3, 33, 2, 16))
    exact = attention_fp64(q, k, v, lengths)
    for b, n in enumerate(lengths):
        for t in (q, k, v):
            t[b, n:] = 1e4
    out = joint_attention(q, k, v, lengths=lengths, backend=AttentionChoice("cudnn", "", ragged=ragged))
    assert (out - exact).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["flash4", "flash3", "flash2", "xformers"])
def test_trains_through_the_library(libraries, backend):
    inputs = [t.detach().requires_grad_() for t in make_qkv(2, 12, 2, 16)]
    ours = torch.autograd.grad(joint_attention(*inputs, lengths=(12, 5), backend=backend).sum(), inputs)
    truth = torch.autograd.grad(attention_fp64(*inputs, (12, 5)).sum(), inputs)
    torch.testing.assert_close(ours, truth)


def test_lengths_are_copied_to_the_device_once():
    first = attention_backends.lengths_tensor((5, 3), torch.device("cpu"))
    assert first is attention_backends.lengths_tensor((5, 3), torch.device("cpu"))
    assert first.dtype == torch.int32 and first.tolist() == [5, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("ragged", attention_backends.RAGGED_ORDER)
def test_unequal_lengths_on_a_gpu(ragged):
    """Every call that "auto" may come to, with a sample that has no padding and one that is nearly all padding."""
    device = torch.device("cuda")
    if why := available_backends(device)[ragged] or attention_backends.why_not_ragged(ragged, device):
        pytest.skip(why)
    q, k, v = make_qkv(3, 515, 4, 128, dtype=torch.bfloat16, device=device)
    lengths = (515, 2, 300)
    out = joint_attention(q, k, v, lengths=lengths, backend=AttentionChoice("sdpa", "", ragged=ragged))
    assert (out - attention_fp64(q, k, v, lengths)).abs().max() < tolerance(torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", *attention_backends.BACKENDS])
@pytest.mark.parametrize("lengths", [None, (515, 300), (400, 400)], ids=str)
def test_on_a_gpu(backend, lengths):
    device = torch.device("cuda")
    if why := available_backends(device).get(backend):
        pytest.skip(why)
    q, k, v = make_qkv(2, 515, 4, 128, dtype=torch.bfloat16, device=device)
    out = joint_attention(q, k, v, lengths=lengths, backend=backend)
    assert (out - attention_fp64(q, k, v, lengths)).abs().max() < tolerance(torch.bfloat16)
    if backend != "triton":
        inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        ours = torch.autograd.grad(joint_attention(*inputs, lengths=lengths, backend=backend).sum(), inputs)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth = torch.autograd.grad(attention_fp64(*exact, lengths).sum(), exact)
        for a, b in zip(ours, truth):
            assert (a - b).abs().max() < 2e-2 * b.abs().max().clamp(min=1)
