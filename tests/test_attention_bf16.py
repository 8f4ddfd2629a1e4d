"""The "cpu_bf16" backend of joint_attention: against fp64 and torch's own bf16 error, padding, compile, its choice."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from uniworld.kernels import attention_backends, attention_bf16, extension
from uniworld.kernels.attention_backends import available_backends, choose_backend
from uniworld.kernels.joint_attention import joint_attention

WHY_NOT = attention_bf16.why_missing()
runs_here = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(autouse=True)
def forget_choices():
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def make_qkv(B, S, H, Dh):
    """Views of one fused projection, as the model has them."""
    torch.manual_seed(0)
    return torch.randn(B, S, 3, H, Dh).bfloat16().unbind(2)


def ours(q, k, v, lengths=None):
    with torch.no_grad():
        return joint_attention(q, k, v, lengths=lengths, backend="cpu_bf16")


def torch_sdpa(q, k, v):
    with torch.no_grad():
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def attention_fp64(q, k, v):
    q, k, v = (t.double() for t in (q, k, v))
    weights = (torch.einsum("bshd,bthd->bhst", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v)


def assert_close_to_fp64(q, k, v):
    """The mean error at most 1.5 times that of torch's own bf16 attention, the largest at most 1.5 times and an ulp."""
    out, truth = ours(q, k, v), attention_fp64(q, k, v)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    error, theirs = ((x.double() - truth).abs() for x in (out, torch_sdpa(q, k, v)))
    assert error.square().mean() <= 1.5**2 * theirs.square().mean()
    ulp = torch.finfo(torch.bfloat16).eps * truth.abs()
    assert torch.all(error <= 1.5 * theirs.max() + ulp)


@runs_here
@pytest.mark.parametrize("Dh", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("S", [1, 7, 65, 333])
def test_matches_fp64(S, Dh):
    assert_close_to_fp64(*make_qkv(2, S, 3, Dh))


@runs_here
def test_matches_fp64_at_the_sizes_of_the_benchmark():
    assert_close_to_fp64(*make_qkv(1, 1344, 8, 128))


@runs_here
def test_any_strides():
    """Heads first, every other token, an odd address, and channels that are not contiguous."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 100, 64).bfloat16().transpose(1, 2)
    k = torch.randn(2, 200, 3, 64).bfloat16()[:, ::2]
    v = torch.randn(2 * 100 * 3 * 64 + 1).bfloat16()[1:].view(2, 100, 3, 64)
    assert v.data_ptr() % 4 == 2
    expected = ours(q.contiguous(), k.contiguous(), v.clone())
    assert torch.equal(ours(q, k, v), expected)
    assert torch.equal(ours(q, k, v.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert_close_to_fp64(q, k, v)


@runs_here
@pytest.mark.parametrize("scale", [5.0, 40.0])
def test_large_logits(scale):
    """Scores in the hundreds and ten thousands, where nearly all the weight is on one key."""
    q, k, v = make_qkv(2, 333, 3, 64)
    assert_close_to_fp64(q * scale, k * scale, v)


@runs_here
@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_a_maximum_that_moves_from_block_to_block(sign):
    """Scores -140..140 in order: each block of keys scales earlier results down, or adds next to nothing."""
    S, Dh = 700, 32
    q, k, v = (t.clone() for t in make_qkv(1, S, 2, Dh))
    q[..., 0], k[..., 0] = 20.0, sign * torch.linspace(-40, 40, S).bfloat16()[None, :, None]
    assert_close_to_fp64(q, k, v)


@runs_here
def test_values_that_are_known():
    """Equal scores give the mean; a score far above the others gives that value alone, bit for bit."""
    q, k, v = (t.clone() for t in make_qkv(1, 77, 1, 32))
    v[:] = torch.arange(77)[None, :, None, None] - 36  # the mean is 2
    assert torch.all(ours(torch.zeros_like(q), k, v) == 2)
    q[:], k[:] = 1, 0
    k[0, 53] = 100
    assert torch.all(ours(q, k, v) == 17)


@runs_here
def test_exponential():
    """2^x to 3e-6 of itself, 1 at 0; next to nothing below -126, also at minus infinity; NaN stays."""
    x = torch.cat([torch.linspace(-126, 8, 100_003), torch.tensor([0.0, -127, -1e30, -torch.inf, torch.nan])])
    y = torch.empty_like(x)
    extension.core().attention_bf16_power_of_two(x.data_ptr(), y.data_ptr(), len(x))
    truth = x[:-5].double().exp2()
    assert ((y[:-5] - truth) / truth).abs().max() < 3e-6
    assert y[-5] == 1 and torch.all(y[-4:-1] == 2.0**-126) and y[-1].isnan()


@runs_here
def test_nan_stays_in_its_row():
    q, k, v = (t.clone() for t in make_qkv(1, 77, 2, 32))
    plain = ours(q, k, v)
    q[0, 5, 1, 3] = float("nan")
    out = ours(q, k, v)
    assert torch.all(out[0, 5, 1].isnan())
    out[0, 5, 1] = plain[0, 5, 1]
    assert torch.equal(out, plain)


@runs_here
@pytest.mark.parametrize("lengths", [(333, 1, 50), (60, 60, 60)], ids=str)
def test_padded_batch_equals_each_sample_alone(lengths):
    """Bit for bit, although the padding holds NaN; and the rows of the padding are zero."""
    q, k, v = (t.clone() for t in make_qkv(3, 333, 2, 96))
    alone = [ours(*(t[b : b + 1, :n].clone() for t in (q, k, v)))[0] for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        for t in (q, k, v):
            t[b, n:] = float("nan")
    out = ours(q, k, v, lengths)
    for b, n in enumerate(lengths):
        assert torch.equal(out[b, :n], alone[b])
        assert torch.all(out[b, n:] == 0)


@runs_here
def test_the_same_bits_with_any_number_of_threads():
    q, k, v = make_qkv(1, 333, 3, 64)
    before = torch.get_num_threads()
    try:
        outs = [(torch.set_num_threads(n), ours(q, k, v))[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@runs_here
@pytest.mark.parametrize("lengths", [None, (9, 40)], ids=str)
def test_compiles_without_graph_break(lengths):
    torch._dynamo.reset()
    q, k, v = make_qkv(2, 40, 2, 64)
    compiled = torch.compile(joint_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, lengths=lengths, backend="cpu_bf16"), ours(q, k, v, lengths))


@runs_here
def test_compiles_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(joint_attention, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for S in (40, 70):
        q, k, v = make_qkv(2, S, 2, 64)
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 1)
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v, backend="cpu_bf16"), ours(q, k, v))
    assert len(graphs) == 1


@runs_here
def test_opcheck():
    torch.library.opcheck(torch.ops.uniworld.attention_bf16, (*make_qkv(2, 40, 2, 64), None))
    torch.library.opcheck(torch.ops.uniworld.attention_bf16, (*make_qkv(2, 40, 2, 64), (40, 40)))


# Choice of backend, on CPUs that are not here.


def pretend(monkeypatch, *features, built=True):
    monkeypatch.setattr(extension, "CPU_FEATURES", frozenset(features))
    monkeypatch.setattr(extension, "has", lambda function: built)
    choose_backend.cache_clear()


def choice(device="cpu", dtype=torch.bfloat16, head_dim=128, name="auto"):
    return choose_backend(name, device=device, dtype=dtype, head_dim=head_dim)


def test_auto_takes_it_on_a_cpu_without_amx(monkeypatch):
    pretend(monkeypatch, "avx512_bf16")
    assert choice().name == "cpu_bf16" and choice().why == "first of cpu_bf16, sdpa that runs here"
    assert choice(head_dim=32).name == choice(head_dim=256).name == "cpu_bf16"
    assert available_backends("cpu")["cpu_bf16"] == ""


@pytest.mark.parametrize(
    "wanted,why",
    [
        ({"dtype": torch.float32}, "needs bfloat16, not torch.float32"),
        ({"head_dim": 48}, "needs a head_dim that is a multiple of 32 and at most 256, not 48"),
        ({"head_dim": 288}, "needs a head_dim that is a multiple of 32 and at most 256, not 288"),
        ({"device": "meta"}, "needs a CPU"),
    ],
    ids=str,
)
def test_auto_passes_over_what_it_cannot_serve(monkeypatch, wanted, why):
    pretend(monkeypatch, "avx512_bf16")
    assert choice(**wanted).name == "sdpa" and f"(cpu_bf16: {why})" in choice(**wanted).why
    with pytest.raises(ValueError, match=f"attention='cpu_bf16': {why}; available on"):
        choice(**wanted, name="cpu_bf16")


def test_auto_leaves_amx_to_torch_but_takes_a_request(monkeypatch):
    pretend(monkeypatch, "avx512_bf16", "amx_bf16")
    assert choice().name == "sdpa" and "(cpu_bf16: this CPU has AMX, which torch's own kernel uses)" in choice().why
    assert choice(name="cpu_bf16").name == "cpu_bf16"


@pytest.mark.parametrize("features", [(), ("amx_bf16",)], ids=str)
def test_needs_the_instructions(monkeypatch, features):
    pretend(monkeypatch, *features)
    assert choice().name == "sdpa"
    assert available_backends("cpu")["cpu_bf16"] == "needs a CPU with AVX512-BF16"
    with pytest.raises(ValueError, match="'cpu_bf16': needs a CPU with AVX512-BF16; available on cpu: .*sdpa"):
        choice(name="cpu_bf16")


@pytest.mark.parametrize("missing", ["the C++ core is not built", ""])
def test_needs_the_core(monkeypatch, missing):
    pretend(monkeypatch, "avx512_bf16", built=False)
    monkeypatch.setattr(extension, "MISSING", missing)
    assert choice().name == "sdpa"
    assert available_backends("cpu")["cpu_bf16"].startswith(missing or "the C++ core was built without it")


def test_a_gpu_never_takes_it(monkeypatch):
    pretend(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(attention_backends, "capability", lambda device: 9)
    assert attention_backends.why_missing("cpu_bf16", torch.device("cuda")) == "needs a CPU"
    assert all("cpu_bf16" not in order for major, order in attention_backends.AUTO_ORDER.items() if major)


@pytest.mark.skipif(not extension.has("cpu_features"), reason="needs the C++ core")
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux's list of CPU flags")
def test_the_cpu_is_read_right():
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert flags & {"avx512_bf16", "amx_bf16"} == extension.CPU_FEATURES
