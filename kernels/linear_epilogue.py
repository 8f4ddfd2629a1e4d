"""The GEMM behind gelu_linear and connector_mlp: y = epilogue(x @ weight.T + bias), in one pass over y.

Letters: M rows of x, K input channels, N output channels, R rows of the buffer that a scattered result goes to.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.registry import INTERPRET, TritonBuild, triton_build

ONEDNN = "onednn"  # the name under which `backend_for` and `extension.has` know torch's CPU GEMM with an epilogue

# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages). Each compiles without register spills and within shared memory
# where it is used; their speed has not been measured on a GPU.
WIDE_TILE = (128, 256, 64, 8, 3)  # Hopper, forward epilogues
LARGE_TILE = (128, 128, 64, 8, 3)  # Ampere, and backward epilogues, which hold more of a tile in registers
SMALL_TILE = (64, 128, 64, 4, 4)  # few rows, where large tiles would leave multiprocessors idle
FLOAT32_TILE = (64, 64, 32, 8, 2)
INTERPRETER_TILE = (32, 32, 32, 4, 1)
GROUP_M = 8  # row tiles that share their weight tiles in L2


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh form; 0.5 (1 + tanh(u)) = sigmoid(2 u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def linear_epilogue_kernel(x_ptr, weight_ptr, bias_ptr, dy_ptr, rows_ptr, y_ptr, act_ptr, M, N, K, R,
                           x_stride, y_stride, EPILOGUE: tl.constexpr, SCATTER: tl.constexpr, UPCAST: tl.constexpr,
                           EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                           GROUP_M: tl.constexpr):
    """One tile of y. EPILOGUE: "none", "gelu", "silu" or "silu_backward" (y = dy * silu'(pre), and silu(pre) into
    act). SCATTER: row m goes to row rows[m] of y; rows outside 0..R-1 are dropped.
    """
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * num_n) * GROUP_M
    group = min(num_m - first_m, GROUP_M)
    tile_m = first_m + tile % (GROUP_M * num_n) % group
    tile_n = tile % (GROUP_M * num_n) // group

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap around: loads need no mask, and the store drops them.
    x_ptrs = x_ptr + (row % M).to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + (col % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0.0)
        if UPCAST:  # the interpreter's bf16 arithmetic is wrong
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    acc += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    if SCATTER:
        target = tl.load(rows_ptr + row, mask=row < M, other=-1)
        mask = mask & ((target >= 0) & (target < R))[:, None]
    else:
        target = row.to(tl.int64)
    offsets = target[:, None] * y_stride + col[None, :]
    if EPILOGUE == "gelu":
        acc = gelu_tanh(acc)
    elif EPILOGUE == "silu":
        acc = acc * tl.sigmoid(acc)
    elif EPILOGUE == "silu_backward":
        s = tl.sigmoid(acc)
        tl.store(act_ptr + offsets, (acc * s).to(act_ptr.dtype.element_ty), mask=mask)
        acc = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * s * (1.0 + acc * (1.0 - s))
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


def tile_for(x: Tensor, num_outputs: int, epilogue: str) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) for this device, type and size; no search, so no noise."""
    if not x.is_cuda:
        return INTERPRETER_TILE
    if x.dtype == torch.float32:
        return FLOAT32_TILE
    properties = torch.cuda.get_device_properties(x.device)
    large = WIDE_TILE if properties.major == 9 and not epilogue.endswith("_backward") else LARGE_TILE
    tiles = triton.cdiv(x.shape[0], large[0]) * triton.cdiv(num_outputs, large[1])
    return large if tiles >= properties.multi_processor_count else SMALL_TILE


def epilogue_build(epilogue: str, tile: tuple[int, int, int, int, int]) -> TritonBuild:
    """The ahead-of-time build of one epilogue at one tile; "none" scatters its rows, as connector_mlp uses it."""
    block_m, block_n, block_k, num_warps, num_stages = tile
    constexprs = {"EPILOGUE": epilogue, "SCATTER": epilogue == "none", "UPCAST": False, "EVEN_K": True,
                  "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": GROUP_M}  # fmt: skip
    build = triton_build(linear_epilogue_kernel, constexprs, num_warps=num_warps, num_stages=num_stages)
    capabilities = (90,) if tile == WIDE_TILE else (80, 90)
    signature = build.signature | ({"rows_ptr": "*i64"} if epilogue == "none" else {})
    return replace(build, signature=signature, capabilities=capabilities)


def linear_epilogue_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epilogue: str, *, dy: Tensor | None = None,
                     act: Tensor | None = None, rows: Tensor | None = None) -> None:
    """Write epilogue(x @ weight.T + bias) into `y` with the Triton kernel.

    Args:
        y: [M, N], or [R, N] with `rows`; last dimension contiguous.
        x: [M, K], last dimension contiguous.
        weight, bias: [N, K] and [N], contiguous.
        epilogue: "none", "gelu", "silu" or "silu_backward".
        dy, act: [M, N] with the strides of y, for the backward epilogue.
        rows: [M] int64, the row of `y` that each row goes to; rows outside 0..R-1 are dropped.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M == 0 or N == 0:
        return
    block_m, block_n, block_k, num_warps, num_stages = tile_for(x, N, epilogue)
    linear_epilogue_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        x, weight, bias, y if dy is None else dy, y if rows is None else rows, y, y if act is None else act,
        M, N, K, y.shape[0], x.stride(0), y.stride(0), EPILOGUE=epilogue, SCATTER=rows is not None,
        UPCAST=INTERPRET, EVEN_K=K % block_k == 0, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """activation(x @ weight.T + bias) on the CPU: "none", "gelu" (tanh) or "silu".

    oneDNN applies the activation to each tile of the GEMM while it is in cache. Its bf16 needs AVX-512; without it
    this is F.linear and a second pass.
    """
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if activation == "gelu" else F.silu(y) if activation == "silu" else y
    name, algorithm = {"none": ("none", ""), "gelu": ("gelu", "tanh"), "silu": ("swish", "")}[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def linear_gradients(dpre: Tensor, x: Tensor, weight: Tensor,
                     needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [..., K], weight [N, K] and bias [N] from that of x @ weight.T + bias; None where not needed."""
    flat = dpre.reshape(-1, weight.shape[0])
    dx = (flat @ weight).reshape(x.shape) if needs[0] else None
    dweight = flat.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
    dbias = flat.sum(0) if needs[2] else None
    return dx, dweight, dbias
