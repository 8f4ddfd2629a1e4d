"""The e4m3 ops against the list of e4m3 numbers in fp64: every value is the nearest one, with the scale of its row.

On a machine with a GPU all of it runs there, Triton's kernels compiled; elsewhere on the CPU, by the interpreter.
"""

import pytest
import torch

from uniworld.kernels.fp8_linear import fp8_linear
from uniworld.kernels.quantize_rows import QuantizedRows, dequantized, quantize_rows
from uniworld.kernels.registry import INTERPRET, load_ops, use_backend

pytestmark = pytest.mark.gpu
OPS = load_ops()
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FP8_GPU = GPU and torch.cuda.get_device_capability() >= (8, 9)
BACKENDS = ["torch", *(["triton"] if INTERPRET or FP8_GPU else [])]
E4M3_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def half_step(v):
    """Half the distance between the e4m3 numbers around |v|: 3 bits of mantissa, and steps of 2**-9 below 2**-6."""
    exponent = v.abs().clamp(min=2.0**-6).log2().floor()
    return torch.exp2(exponent - 4)


def check_nearest(rows: QuantizedRows, exact):
    """`exact` fp64; the slack stands for fp32 arithmetic before the rounding."""
    values, scale, exact = rows.values.double().cpu(), rows.scale.double().cpu(), exact.cpu()
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scale.dtype == torch.float32
    assert rows.scale.shape == (*exact.shape[:-1], 1)
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, (largest / 448).clamp(min=1e-12 / 448), rtol=1e-5, atol=0)
    scaled = exact / scale
    distance = (values - scaled).abs()
    assert (distance <= half_step(scaled) * (1 + 1e-3) + 1e-4 * scaled.abs()).all()
    assert (values.abs().amax(-1)[largest[..., 0] > 1e-6] == 448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["quantize_rows", "adaln_modulate_fp8", "gate_residual_adaln_fp8"])
def test_every_value_is_the_nearest(name, backend, dtype):
    op = OPS[name]
    if backend == "torch" and dtype == torch.bfloat16 and name != "quantize_rows":
        pytest.skip("the reference rounds to bf16 in between, as plain torch does")
    for case in op.cases:
        if backend == "torch" and dtype == torch.bfloat16 and case.get("G"):
            continue
        torch.manual_seed(0)
        inputs = op.make_inputs(**case, dtype=dtype, device=DEVICE)
        exact = op.decode(op.reference(**{k: v if v is None else v.double() for k, v in inputs.items()}))
        with use_backend(backend):
            result = op.fn(**inputs)
        if name == "gate_residual_adaln_fp8":
            residual, result = result
            plain = (inputs["x"].double() + inputs["gate"].double()[:, None] * inputs["y"].double()).cpu()
            unit = torch.finfo(dtype).eps * plain.abs() + 1e-6
            assert ((residual.double().cpu() - plain).abs() <= unit).all()
            exact = exact[1]
        check_nearest(result, exact)


TIES = {  # between two e4m3 numbers: the one with an even last bit
    17.0: 16.0,
    19.0: 20.0,
    -27.0: -28.0,
    1.0625: 1.0,
    2.0**-10: 0.0,
    3 * 2.0**-10: 2.0**-8,
    31.0: 32.0,  # the carry goes into the exponent
    15.999: 16.0,
    0.0155: 0.015625,  # from below 2**-6, where steps are constant, to the first normal number
    447.0: 448.0,
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_carries(backend):
    x = torch.tensor([[448.0, *TIES]], device=DEVICE)
    with use_backend(backend):
        rows = quantize_rows(x)
    assert rows.scale.item() == 1
    assert rows.values.double().tolist() == [[448.0, *TIES.values()]]
    assert set(TIES.values()) <= set(E4M3_NUMBERS.tolist())


@pytest.mark.parametrize("backend", BACKENDS if FP8_GPU else ["torch"])  # the interpreter's conversion knows no NaN
def test_a_row_that_is_not_finite_stays_so(backend):
    x = torch.randn(3, 32, device=DEVICE)
    x[1, 5] = float("nan")
    with use_backend(backend):
        rows = dequantized(quantize_rows(x))
    assert rows[[0, 2]].isfinite().all() and rows[1].isnan().any()


def test_a_slice_of_a_sequence_is_read_in_place():
    x = torch.randn(2, 9, 48, device=DEVICE)
    for backend in BACKENDS:
        with use_backend(backend):
            part, whole = quantize_rows(x[:, 3:7]), quantize_rows(x)
        assert torch.equal(part.values.float(), whole.values[:, 3:7].float())
        assert torch.equal(part.scale, whole.scale[:, 3:7])


def test_the_product_is_that_of_the_e4m3_numbers():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 64, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    bias = torch.randn(32, device=DEVICE)
    rows, columns = quantize_rows(x), quantize_rows(weight)
    y = fp8_linear(*rows, *columns, bias)
    products = dequantized(rows).double() @ dequantized(columns).double().t()
    torch.testing.assert_close(y.double(), products + bias.double(), rtol=1e-6, atol=1e-6)
    # What e4m3 itself costs: about 2**-4 / sqrt(3) a number, averaged over the sum.
    error = (products - x.double() @ weight.double().t()).norm() / products.norm()
    assert 0.01 < error < 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantize_rows(None), "x, gelu_of: give one"),
        (lambda: quantize_rows(torch.zeros(2, 4), torch.zeros(3, 4)), r"gelu_of=\(3, 4\)"),
        (lambda: quantize_rows(torch.zeros(2, 4), torch.zeros(2, 4).bfloat16()), "gelu_of=.*bfloat16"),
        (lambda: product(24, 32), r"weight=\(32, 24\): must be \[N, K\], multiples of 16"),
        (lambda: product(32, 24), r"weight=\(24, 32\): must be"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def product(K, N):
    return fp8_linear(*quantize_rows(torch.ones(2, K)), *quantize_rows(torch.ones(N, K)), torch.zeros(N))


def test_scales_of_another_shape_are_refused():
    x, weight = quantize_rows(torch.ones(2, 16)), quantize_rows(torch.ones(16, 16))
    with pytest.raises(ValueError, match=r"x_scale=\(2,\): must be \(2, 1\)"):
        fp8_linear(x.values, x.scale[:, 0], *weight, torch.zeros(16))


@pytest.mark.skipif(not FP8_GPU, reason="needs a CUDA device of sm_89 or newer")
@pytest.mark.parametrize("M, K, N", [(1, 64, 32), (37, 272, 80), (520, 3072, 9216), (300, 15360, 3072)])
def test_scaled_mm_on_a_gpu(M, K, N):
    """The tensor cores' sum, in fewer bits than fp32, against fp64."""
    torch.manual_seed(0)
    x, weight = torch.randn(M, K, device="cuda") * 3, torch.randn(N, K, device="cuda") * K**-0.5
    rows, columns = quantize_rows(x.bfloat16()), quantize_rows(weight.bfloat16())
    bias = torch.randn(N, device="cuda", dtype=torch.bfloat16)
    y = fp8_linear(*rows, *columns, bias)
    assert y.dtype == torch.bfloat16 and y.shape == (M, N)
    exact = dequantized(rows).double() @ dequantized(columns).double().t() + bias.double()
    assert (y.double() - exact).norm() / exact.norm() < 4e-3  # bf16 alone rounds by up to 2**-9
