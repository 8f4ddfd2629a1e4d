"""ema_update: bits of the authors' code, bits of plain torch on every backend, bad input, the CUDA launcher."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uniworld.kernels import ema_update as module
from uniworld.kernels import extension
from uniworld.kernels.ema_update import CHUNK, ema_update
from uniworld.kernels.registry import INTERPRET, use_backend

GPU = torch.cuda.is_available()
DATA = Path(__file__).parent / "data"
BACKENDS = ["torch", *(["cpp"] if extension.has("ema_update") else []), *(["triton"] if INTERPRET else [])]
ON_GPU = [*(["cpp"] if extension.has("ema_update_cuda") else []), "triton"]
# (shape, elements off alignment): odd sizes, empty, a scalar, more than one chunk of every kernel.
SHAPES = (((3, 5), 0), ((0,), 0), ((), 0), ((7,), 1), ((CHUNK,), 0), ((CHUNK + 1,), 0), ((5, 26701), 0), ((70001,), 3))


def tensors(dtype, device="cpu"):
    flat = [torch.randn(torch.Size(s).numel() + k, dtype=torch.float32).to(device, dtype)[k:] for s, k in SHAPES]
    return [t.view(s) for t, (s, _) in zip(flat, SHAPES)]


def expected(ema, source, decay):
    """Out of place, by the formula and order of roundings of diffusers' EMAModel."""
    return [e - (1 - decay) * (e - s.float()) for e, s in zip(ema, source)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_steps_bit_by_bit(backend):
    golden = load_file(DATA / "golden_ema.safetensors")
    frozen = torch.arange(golden["initial"].numel()) >= 16  # model.b: the authors copy frozen parameters verbatim
    ema = golden["initial"].clone()
    with use_backend(backend):
        for params, wanted, decay in zip(golden["params"], golden["ema"], golden["decay"].tolist()):
            ema_update([ema[:12].view(4, 3), ema[12:16]], [params[:12].view(4, 3), params[12:16]], decay)
            ema_update([ema[frozen.nonzero()[0].item() :]], [params[frozen]], 0.0)
            assert torch.equal(ema, wanted), f"decay {decay}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.999, 0.18181818181818182, 1.0])
def test_bits_of_plain_torch(backend, dtype, decay):
    torch.manual_seed(0)
    ema, source = tensors(torch.float32), tensors(dtype)
    wanted, kept = expected(ema, source, decay), [s.clone() for s in source]
    with use_backend(backend):
        ema_update(ema, source, decay)
    for i, (e, w) in enumerate(zip(ema, wanted)):
        assert torch.equal(e, w), f"tensor {i} of shape {SHAPES[i]}"
    assert all(torch.equal(s, k) for s, k in zip(source, kept))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_zero_copies_the_source(backend, dtype):
    torch.manual_seed(0)
    ema, source = [1e8 * t for t in tensors(torch.float32)], tensors(dtype)
    assert not torch.equal(ema[0] + (source[0].float() - ema[0]), source[0].float())  # the formula alone is not enough
    with use_backend(backend):
        ema_update(ema, source, 0.0)
    assert all(torch.equal(e, s.float()) for e, s in zip(ema, source))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_neighbours(backend):
    """fp32 and bf16 sources in one call; nothing outside the tensors is written."""
    torch.manual_seed(0)
    buffer = torch.randn(64)
    before = buffer.clone()
    ema, source = [buffer[1:18], buffer[20:33]], [torch.randn(17), torch.randn(13).bfloat16()]
    wanted = expected([e.clone() for e in ema], source, 0.5)
    with use_backend(backend):
        ema_update(ema, source, 0.5)
    assert torch.equal(ema[0], wanted[0]) and torch.equal(ema[1], wanted[1])
    outside = torch.ones(64, dtype=torch.bool)
    outside[1:18] = outside[20:33] = False
    assert torch.equal(buffer[outside], before[outside])


def test_thread_counts_give_equal_bits():
    torch.manual_seed(0)
    results, threads = [], torch.get_num_threads()
    source = [torch.randn(300_001).bfloat16()]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            ema = [torch.ones(300_001)]
            ema_update(ema, source, 0.9)
            results.append(ema[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_parameters_and_version_counter():
    """Trained parameters may be the source as they are; autograd sees that the averages changed."""
    ema, source = torch.zeros(3), torch.nn.Parameter(torch.ones(3))
    version = ema._version
    ema_update([ema], [source], 0.5)
    assert torch.equal(ema, torch.full((3,), 0.5)) and ema._version > version and not ema.requires_grad


def test_empty_list():
    ema_update([], [], 0.9)


@pytest.mark.parametrize(
    "ema,source,decay,message",
    [
        ([(2,), (3, 2)], [(2,), (2, 3)], 0.9, r"source\[1\]\.shape=\(2, 3\): must equal ema\[1\]\.shape=\(3, 2\)"),
        ([(2,)], [(2,), (2,)], 0.9, "source has 2 tensors: must have as many as ema, 1"),
        ([(2,)], [(2,)], 1.5, "decay=1.5: must be between 0 and 1"),
        ([(2,)], [(2,)], float("nan"), "decay=nan: must be between 0 and 1"),
    ],
)
def test_refuses_what_does_not_fit(ema, source, decay, message):
    with pytest.raises(ValueError, match=message):
        ema_update([torch.zeros(s) for s in ema], [torch.zeros(s) for s in source], decay)


def test_refuses_strides_and_dtypes():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"ema\[1\] has strides \(1, 4\): must be contiguous"):
        ema_update([x, x.t()], [x, x], 0.9)
    with pytest.raises(ValueError, match=r"source\[0\] has strides \(8, 2\): must be contiguous"):
        ema_update([x], [torch.zeros(4, 8)[:, ::2]], 0.9)
    with pytest.raises(ValueError, match=r"ema\[0\]\.dtype=torch\.bfloat16: must be torch\.float32"):
        ema_update([x.bfloat16()], [x], 0.9)
    with pytest.raises(ValueError, match=r"source\[0\]\.dtype=torch\.float16: must be"):
        ema_update([x], [x.half()], 0.9)
    with pytest.raises(ValueError, match=r"source\[0\] is on meta, ema\[0\] on cpu: must be on cpu"):
        ema_update([x], [x.to("meta")], 0.9)


def test_chunk_table_covers_every_element_once_and_is_kept():
    counts = (0, 1, CHUNK, 2 * CHUNK + 5)
    args = (torch.device("cpu"), (64, 128, 1 << 20, 1 << 24), (64, 4, 1 << 22, 1 << 26), counts, (0, 1, 1, 0))
    table = module._chunk_table(*args)
    assert table[:, 2].tolist() == [1, CHUNK, CHUNK, CHUNK, 5]
    assert table[:, 3].tolist() == [1, 3, 2, 2, 0]  # bf16 or not, and aligned where addresses and count allow it
    assert table[:, 0].tolist() == [128, 1 << 20, *((1 << 24) + 4 * CHUNK * i for i in range(3))]
    assert table[:, 1].tolist() == [4, 1 << 22, *((1 << 26) + 4 * CHUNK * i for i in range(3))]
    assert module._chunk_table(*args) is table
    assert module._chunk_table(*args[:-1], (0, 1, 1, 1)) is not table


def test_core_names_its_cuda_architectures():
    if extension.core() is None:
        pytest.skip(extension.MISSING)
    archs = extension.core().cuda_archs
    assert isinstance(archs, str)
    assert bool(archs) == extension.has("ema_update_cuda")


def test_launch_without_a_device_names_the_cuda_error():
    if GPU or not extension.has("ema_update_cuda"):
        pytest.skip("needs a core built with nvcc, and no GPU")
    with pytest.raises(RuntimeError, match=r"CUDA launch failed: cudaError\w+ \(.+\)"):
        extension.core().ema_update_cuda(0, 1, 0.5, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.999, 0.0])
def test_gpu_kernels_give_the_bits_of_plain_torch(backend, dtype, decay):
    torch.manual_seed(0)
    ema, source = tensors(torch.float32, "cuda"), tensors(dtype, "cuda")
    wanted = expected(ema, source, decay) if decay else [s.float() for s in source]
    with use_backend(backend):
        assert module._implementation(ema[0]) == ("cuda" if backend == "cpp" else "triton")
        ema_update(ema, source, decay)
    assert all(torch.equal(e, w) for e, w in zip(ema, wanted))
