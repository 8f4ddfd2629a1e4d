"""region_mse: the region-weighted, padding-aware flow-matching loss, with its gradient in the forward pass.

Letters: B batch, L packed tokens, C channels; channel c belongs to latent c % 4 of the token's 2x2 latents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.registry import KERNEL_DTYPES, Op, TritonBuild, backend_for, register

BLOCK = 2048  # elements of one partial sum, and of one program
SUM_BLOCK = 1024
NUM_WARPS = 4


def region_mse(pred: Tensor, target: Tensor, weight: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """sum(weight * (pred - target)^2 over valid elements) / number of valid elements; 0 where none is valid.

    The weights do not enter the divisor. The forward pass also writes the gradient for pred, up to one scalar, so that
    backward is one multiply. Partial sums and no atomics: the same bits every run. pred and target may hold NaN in
    the padding.

    Args:
        pred: [B, L, C], fp32 or bf16, C a multiple of 4.
        target: [B, L, C], fp32 or bf16; gets no gradient.
        weight: [B, L, 4] fp32, of each token's 2x2 latents in the order dy * 2 + dx; 1 where None.
        valid: [B, L, 4] bool or uint8, 0 for padded latents; all valid where None.

    Returns: scalar fp32; the arithmetic is fp32. fp64 inputs give an fp64 reference result.

    Raises:
        ValueError: a shape or a dtype does not fit, or target or weight requires a gradient.
    """
    _check(pred, target, weight, valid)
    if backend_for(pred) == "torch":
        return region_mse_reference(pred, target, weight, valid)
    return _forward_op(pred, target, weight, valid, pred.requires_grad and torch.is_grad_enabled())[0]


def region_mse_reference(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    # As the original does, and as a loss needs: bf16 differences are squared and summed in fp32.
    dtype = torch.promote_types(pred.dtype, torch.float32)
    error = (pred.to(dtype) - target.to(dtype)).unflatten(2, (-1, 4))
    if valid is not None:
        error = error.masked_fill(valid[:, :, None] == 0, 0)  # before squaring: NaN in the padding must not spread
    squared = error.square()
    if weight is not None:
        squared = squared * weight[:, :, None]
    if valid is None:
        return squared.sum() / max(error.numel(), 1)
    return squared.sum() / ((valid != 0).sum() * (pred.shape[2] // 4)).clamp(min=1)


def _check(pred: Tensor, target: Tensor, weight: Tensor | None, valid: Tensor | None) -> None:
    if pred.ndim != 3 or pred.shape[2] % 4:
        raise ValueError(f"pred={tuple(pred.shape)}: must be [batch, tokens, channels], channels a multiple of 4")
    if target.shape != pred.shape:
        raise ValueError(f"target={tuple(target.shape)}: must be {tuple(pred.shape)} as pred")
    if pred.dtype in KERNEL_DTYPES and target.dtype not in KERNEL_DTYPES:
        raise ValueError(f"target.dtype={target.dtype}: must be torch.float32 or torch.bfloat16")
    for name, x, dtypes in (("weight", weight, (torch.float32,)), ("valid", valid, (torch.bool, torch.uint8))):
        if x is None:
            continue
        if tuple(x.shape) != (*pred.shape[:2], 4):
            raise ValueError(f"{name}={tuple(x.shape)}: must be {(*pred.shape[:2], 4)} for pred of {tuple(pred.shape)}")
        if x.dtype not in dtypes and pred.dtype in KERNEL_DTYPES:
            raise ValueError(f"{name}.dtype={x.dtype}: must be {' or '.join(map(str, dtypes))}")
    for name, x in (("target", target), ("weight", weight)):
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}.requires_grad=True: only pred gets a gradient")


@triton.jit
def _forward_kernel(
    pred_ptr, target_ptr, weight_ptr, valid_ptr, grad_ptr, sum_ptr, count_ptr, N, C,
    HAS_WEIGHT: tl.constexpr, HAS_VALID: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    latent = offsets // C * 4 + offsets % 4  # C is a multiple of 4
    counted = mask
    if HAS_VALID:
        counted = mask & (tl.load(valid_ptr + latent, mask=mask, other=0) != 0)
    # Loads masked by `mask` alone stay 16-byte ones; the padding is cut out afterwards.
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    error = tl.where(counted, pred - target, 0.0)
    weighted = error
    if HAS_WEIGHT:
        weighted = tl.load(weight_ptr + latent, mask=counted, other=0.0) * error
    if NEEDS_GRAD:
        tl.store(grad_ptr + offsets, 2.0 * weighted, mask=mask)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(weighted * error, axis=0))
    if HAS_VALID:
        tl.store(count_ptr + tl.program_id(0), tl.sum(counted.to(tl.int32), axis=0))


@triton.jit
def _finish_kernel(
    sum_ptr, count_ptr, loss_ptr, scale_ptr, N, num_partials, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr
):
    total = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, num_partials, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_partials
        total += tl.load(sum_ptr + offsets, mask=mask, other=0.0)
        if HAS_VALID:
            counted += tl.load(count_ptr + offsets, mask=mask, other=0).to(tl.int64)
    count = N * 1.0
    if HAS_VALID:
        count = tl.maximum(tl.sum(counted, axis=0), 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(total, axis=0) / count)
    tl.store(scale_ptr, 1.0 / count)


@triton.jit
def _backward_kernel(grad_ptr, scale_ptr, dloss_ptr, dpred_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    scale = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(dpred_ptr + offsets, grad * scale, mask=mask)


@torch.library.custom_op("uniworld::region_mse", mutates_args=())
def _forward_op(
    pred: Tensor, target: Tensor, weight: Tensor | None, valid: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, 2 * weight * (pred - target) where valid, 1 / number of valid elements); the second only where needed.

    The gradient is stored without the divisor, which is known only once every program has counted.
    """
    pred, target = pred.contiguous(), target.contiguous()
    # A pointer that the kernel does not read stands for what is None.
    weights = pred if weight is None else weight.contiguous()
    valids = pred if valid is None else valid.contiguous().view(torch.uint8)
    N, C = pred.numel(), pred.shape[2]
    grad = torch.empty_like(pred) if needs_grad else pred.new_empty(0)
    if N == 0:
        return pred.new_zeros((), dtype=torch.float32), grad, pred.new_zeros((), dtype=torch.float32)
    loss, scale = (pred.new_empty((), dtype=torch.float32) for _ in range(2))
    num_partials = triton.cdiv(N, BLOCK)
    sums = pred.new_empty(num_partials, dtype=torch.float32)
    counts = pred.new_empty(num_partials, dtype=torch.int32)
    _forward_kernel[(num_partials,)](
        pred, target, weights, valids, grad, sums, counts, N, C,
        HAS_WEIGHT=weight is not None, HAS_VALID=valid is not None, NEEDS_GRAD=needs_grad,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    _finish_kernel[(1,)](sums, counts, loss, scale, N, num_partials, HAS_VALID=valid is not None, BLOCK=SUM_BLOCK)
    return loss, grad, scale


@_forward_op.register_fake
def _(pred, target, weight, valid, needs_grad):
    grad = torch.empty_like(pred, memory_format=torch.contiguous_format) if needs_grad else pred.new_empty(0)
    return pred.new_empty((), dtype=torch.float32), grad, pred.new_empty((), dtype=torch.float32)


@torch.library.custom_op("uniworld::region_mse_backward", mutates_args=())
def _backward_op(dloss: Tensor, grad: Tensor, scale: Tensor) -> Tensor:
    dpred = torch.empty_like(grad)
    N = grad.numel()
    if N:
        _backward_kernel[(triton.cdiv(N, BLOCK),)](grad, scale, dloss, dpred, N, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return dpred


@_backward_op.register_fake
def _(dloss, grad, scale):
    return torch.empty_like(grad)


def _setup_context(ctx, inputs, output):
    _, grad, scale = output
    ctx.mark_non_differentiable(grad, scale)
    ctx.save_for_backward(grad, scale)


def _autograd_backward(ctx, dloss, _dgrad, _dscale):
    return _backward_op(dloss, *ctx.saved_tensors), None, None, None, None


_forward_op.register_autograd(_autograd_backward, setup_context=_setup_context)


def _make_inputs(B, L, C, dtype, device, weighted=0, padded=0):
    """`padded` tokens at the end of each sample are invalid, and one latent of its first token."""
    valid = torch.ones(B, L, 4, dtype=torch.bool, device=device)
    valid[:, L - padded :] = False
    valid[:, 0, 1] = False
    return {
        "pred": torch.randn(B, L, C, dtype=dtype, device=device),
        "target": torch.randn(B, L, C, dtype=dtype, device=device),
        "weight": 1 + 4 * torch.rand(B, L, 4, device=device) if weighted else None,
        "valid": valid if padded else None,
    }


def _builds() -> tuple[TritonBuild, ...]:
    forward = {
        "pred_ptr": "*bf16", "target_ptr": "*fp32", "weight_ptr": "*fp32", "valid_ptr": "*u8", "grad_ptr": "*bf16",
        "sum_ptr": "*fp32", "count_ptr": "*i32", "N": "i32", "C": "i32",
        "HAS_WEIGHT": "constexpr", "HAS_VALID": "constexpr", "NEEDS_GRAD": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    finish = {
        "sum_ptr": "*fp32", "count_ptr": "*i32", "loss_ptr": "*fp32", "scale_ptr": "*fp32", "N": "i32",
        "num_partials": "i32", "HAS_VALID": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    backward = {
        "grad_ptr": "*bf16", "scale_ptr": "*fp32", "dloss_ptr": "*fp32", "dpred_ptr": "*bf16", "N": "i32",
        "BLOCK": "constexpr",
    }  # fmt: skip
    kernels = (
        (_forward_kernel, forward, {"HAS_WEIGHT": True, "HAS_VALID": True, "NEEDS_GRAD": True, "BLOCK": BLOCK}),
        (_forward_kernel, forward, {"HAS_WEIGHT": False, "HAS_VALID": False, "NEEDS_GRAD": True, "BLOCK": BLOCK}),
        (_finish_kernel, finish, {"HAS_VALID": True, "BLOCK": SUM_BLOCK}),
        (_backward_kernel, backward, {"BLOCK": BLOCK}),
    )
    return tuple(TritonBuild(kernel=k, signature=s, constexprs=c, num_warps=NUM_WARPS) for k, s, c in kernels)


def _bytes_moved(case: dict[str, int]) -> int:
    """pred and target are read, the gradient is written; a token has four weights and four flags."""
    token_bytes = 3 * 2 * case["C"] + 16 * case.get("weighted", 0) + (4 if case.get("padded") else 0)
    return token_bytes * case["B"] * case["L"]


register(
    Op(
        name="region_mse",
        fn=region_mse,
        reference=region_mse_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "L": 1, "C": 4},
            {"B": 2, "L": 37, "C": 64, "weighted": 1},
            {"B": 1, "L": 50, "C": 12, "padded": 7},
            {"B": 3, "L": 41, "C": 20, "weighted": 1, "padded": 9},
        ),
        bench_cases=(
            {"B": 1, "L": 4096, "C": 64, "weighted": 1},
            {"B": 1, "L": 4096, "C": 64, "weighted": 1, "padded": 512},
        ),
        bytes_moved=_bytes_moved,
        flops=lambda c: 5 * c["B"] * c["L"] * c["C"],
        differentiable=("pred",),
        triton_builds=_builds(),
    )
)
