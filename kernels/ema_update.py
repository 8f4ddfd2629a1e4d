"""ema_update: ema += (1 - decay) * (source - ema) over many tensors in one launch, fp32 averages.

On a CPU the C++ core does it, vectorised and threaded over chunks of all tensors. On a GPU one launch walks a table of
chunks in device memory, which is kept between calls with the same tensors: the CUDA C++ kernel of `csrc/ema_update.cu`
where the core was built with nvcc, else the Triton kernel. `UNIWORLD_EMA_CUDA=0` takes the Triton kernel anyway.
All of them round as the plain torch formula does, so their results are equal bit by bit.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels import extension, registry
from uniworld.kernels.registry import DTYPE_CODES, Op, TritonBuild, register

CHUNK = 16384  # elements a program or block takes; 94 M parameters make 5,760 chunks
BLOCK = 4096
NUM_WARPS = 8
ALIGNED = 2  # with the dtype code of the source, the flags of a chunk: see csrc/ema_update.h
USE_CUDA_CORE = os.environ.get("UNIWORLD_EMA_CUDA", "1") != "0"


def ema_update(ema: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    """Move each average towards its source in place: ema += (1 - decay) * (source - ema), rounded in fp32.

    Args:
        ema: fp32 tensors of any shapes, contiguous, all on one device.
        source: as many tensors of the same shapes on the same device, fp32 or bf16, contiguous.
        decay: in [0, 1]; exactly 0 copies the source's bits.

    Raises:
        ValueError: naming the index of the tensor that does not fit.
    """
    _check(ema, source, decay)
    if not ema:
        return
    with torch.no_grad():
        if _implementation(ema[0]) == "torch":
            _update_torch(ema, source, decay)
        else:
            _update_op(list(ema), list(source), decay)


def ema_update_reference(ema: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> tuple[Tensor, ...]:
    """The new averages; changes nothing in place."""
    if decay == 0:
        return tuple(s.to(e.dtype) for e, s in zip(ema, source))
    return tuple(e + (1 - decay) * (s - e) for e, s in zip(ema, source))


def _check(ema: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay}: must be between 0 and 1")
    if len(ema) != len(source):
        raise ValueError(f"source has {len(source)} tensors: must have as many as ema, {len(ema)}")
    for i, (e, s) in enumerate(zip(ema, source)):
        if e.shape != s.shape:
            raise ValueError(f"source[{i}].shape={tuple(s.shape)}: must equal ema[{i}].shape={tuple(e.shape)}")
        if e.dtype != torch.float32:
            raise ValueError(f"ema[{i}].dtype={e.dtype}: must be torch.float32")
        if s.dtype not in registry.KERNEL_DTYPES:
            raise ValueError(f"source[{i}].dtype={s.dtype}: must be torch.float32 or torch.bfloat16")
        if e.device != ema[0].device or s.device != ema[0].device:
            raise ValueError(f"source[{i}] is on {s.device}, ema[{i}] on {e.device}: must be on {ema[0].device}")
        for name, tensor in (("ema", e), ("source", s)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}] has strides {tensor.stride()}: must be contiguous")


def _implementation(x: Tensor) -> str:
    """The registry's backend, or "cuda": the C++ core's kernel for the GPU."""
    allowed = USE_CUDA_CORE and registry.forced_backend() in ("auto", "cpp")
    if x.is_cuda and allowed and extension.has("ema_update_cuda"):
        return "cuda"
    return registry.backend_for(x, cpp="ema_update")


def _update_torch(ema: Sequence[Tensor], source: Sequence[Tensor], decay: float) -> None:
    for old, new in zip(ema, ema_update_reference(ema, source, decay)):
        old.copy_(new)


@triton.jit
def _update_chunk(ema_ptr, source_ptr, count, weight, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < count
        ema = tl.load(ema_ptr + offsets, mask=mask)
        source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
        # Weight 1 copies the source's bits: ema + (source - ema) does not always give them.
        tl.store(ema_ptr + offsets, tl.where(weight == 1.0, source, ema + weight * (source - ema)), mask=mask)


@triton.jit
def _update_kernel(table_ptr, weight, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    ema_address, source_address = tl.load(row), tl.load(row + 1)
    count, flags = tl.load(row + 2).to(tl.int32), tl.load(row + 3)
    ema_ptr = ema_address.to(tl.pointer_type(tl.float32))
    if flags == 3:  # bf16, aligned: the hints let the compiler use 16-byte accesses
        source_ptr = tl.multiple_of(source_address.to(tl.pointer_type(tl.bfloat16)), 16)
        _update_chunk(tl.multiple_of(ema_ptr, 16), source_ptr, tl.multiple_of(count, 16), weight, BLOCK)
    elif flags == 2:  # fp32, aligned
        source_ptr = tl.multiple_of(source_address.to(tl.pointer_type(tl.float32)), 16)
        _update_chunk(tl.multiple_of(ema_ptr, 16), source_ptr, tl.multiple_of(count, 16), weight, BLOCK)
    elif flags == 1:
        _update_chunk(ema_ptr, source_address.to(tl.pointer_type(tl.bfloat16)), count, weight, BLOCK)
    else:
        _update_chunk(ema_ptr, source_address.to(tl.pointer_type(tl.float32)), count, weight, BLOCK)


@lru_cache(maxsize=8)
def _chunk_table(device, ema_addresses, source_addresses, counts, dtype_codes) -> Tensor:
    """[chunks, 4] int64 on `device`: address of the average, address of the source, elements, flags.

    The arguments after `device` are tuples of ints, one a tensor. The table depends on nothing else, so that it stays
    right when other tensors come to lie at the same addresses.
    """
    rows = [torch.empty(0, 4, dtype=torch.int64)]
    for ema, source, count, code in zip(ema_addresses, source_addresses, counts, dtype_codes):
        start = torch.arange(0, count, CHUNK, dtype=torch.int64)
        size = (count - start).clamp(max=CHUNK)
        aligned = (size % 16 == 0) & (ema % 16 == 0 and source % 16 == 0)
        source_bytes = 2 if code == DTYPE_CODES[torch.bfloat16] else 4
        rows.append(torch.stack([ema + 4 * start, source + source_bytes * start, size, code + ALIGNED * aligned], 1))
    return torch.cat(rows).to(device)


@torch.library.custom_op("uniworld::ema_update", mutates_args=("ema",))
def _update_op(ema: list[Tensor], source: list[Tensor], decay: float) -> None:
    implementation, device = _implementation(ema[0]), ema[0].device
    if implementation == "torch":
        return _update_torch(ema, source, decay)
    addresses = tuple(e.data_ptr() for e in ema), tuple(s.data_ptr() for s in source)
    counts = tuple(e.numel() for e in ema)
    dtype_codes = tuple(DTYPE_CODES[s.dtype] for s in source)
    if implementation == "cpp":
        return extension.core().ema_update(*addresses, counts, dtype_codes, 1 - decay)
    table = _chunk_table(device, *addresses, counts, dtype_codes)
    if not len(table):
        return
    if implementation == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device):
            extension.core().ema_update_cuda(table.data_ptr(), len(table), 1 - decay, device.index, stream)
    else:
        # No fused multiply-add: torch rounds the product and the sum one after the other.
        options = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
        _update_kernel[(len(table),)](table, 1 - decay, **options)


@_update_op.register_fake
def _(ema, source, decay):
    return None


def _update_and_return(ema: list[Tensor], source: list[Tensor], decay: float) -> tuple[Tensor, ...]:
    ema_update(ema, source, decay)
    return tuple(ema)


def _make_inputs(num_matrices, width, dtype, device, offset=0, zero_decay=0):
    """`num_matrices` layers of one [width, width] matrix and two [width] vectors, `offset` elements off alignment."""
    shapes = [(width, width), (width,), (width,)] * num_matrices

    def tensors(dtype):
        flat = [torch.randn(torch.Size(s).numel() + offset, dtype=dtype, device=device) for s in shapes]
        return [t[offset:].view(s) for t, s in zip(flat, shapes)]

    return {"ema": tensors(torch.float32), "source": tensors(dtype), "decay": 0.0 if zero_decay else 0.9}


def _num_elements(case: dict[str, int]) -> int:
    return case["num_matrices"] * case["width"] * (case["width"] + 2)


register(
    Op(
        name="ema_update",
        fn=_update_and_return,
        reference=ema_update_reference,
        make_inputs=_make_inputs,
        cases=(
            {"num_matrices": 1, "width": 1},
            {"num_matrices": 1, "width": 257},
            {"num_matrices": 2, "width": 64, "zero_decay": 1},
            {"num_matrices": 3, "width": 37, "offset": 1},
        ),
        bench_cases=({"num_matrices": 10, "width": 3072},),
        bytes_moved=lambda c: 10 * _num_elements(c),
        flops=lambda c: 3 * _num_elements(c),
        triton_builds=(
            TritonBuild(
                kernel=_update_kernel,
                signature={"table_ptr": "*i64", "weight": "fp32", "BLOCK": "constexpr"},
                constexprs={"BLOCK": BLOCK},
                num_warps=NUM_WARPS,
            ),
        ),
        cpp="ema_update",
    )
)
