"""flow_step: one Euler step of flow matching, with true classifier-free guidance where asked, in one pass.

Letters: B batch, L tokens, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.registry import KERNEL_DTYPES, Op, TritonBuild, backend_for, register

BLOCK = 1024
NUM_WARPS = 4


def flow_step(
    latents: Tensor,
    velocity: Tensor,
    dsigma: Tensor,
    uncond_velocity: Tensor | None = None,
    true_cfg_scale: float = 1.0,
) -> Tensor:
    """latents + dsigma * v, where v = uncond + true_cfg_scale * (velocity - uncond), or velocity without an uncond.

    `dsigma` stays on the device, so that a step can be captured in a CUDA graph. There is no backward.

    Args:
        latents: [B, L, C], fp32 or bf16.
        velocity: [B, L, C], fp32 or bf16, whatever the latents have.
        dsigma: [1] or [B] fp32, sigma_next - sigma: negative when sampling.
        uncond_velocity: [B, L, C], dtype of velocity: the prediction for the negative prompt.
        true_cfg_scale: weight of the guided direction; used with `uncond_velocity` only.

    Returns: [B, L, C], dtype of latents; the arithmetic is done in fp32 (the dtype of dsigma) and rounded once.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    _check(latents, velocity, dsigma, uncond_velocity)
    if backend_for(latents) == "torch":
        return flow_step_reference(latents, velocity, dsigma, uncond_velocity, true_cfg_scale)
    return _step_op(latents, velocity, dsigma, uncond_velocity, true_cfg_scale)


def flow_step_reference(
    latents: Tensor,
    velocity: Tensor,
    dsigma: Tensor,
    uncond_velocity: Tensor | None = None,
    true_cfg_scale: float = 1.0,
) -> Tensor:
    velocity = velocity.to(dsigma.dtype)
    if uncond_velocity is not None:
        uncond = uncond_velocity.to(dsigma.dtype)
        velocity = uncond + true_cfg_scale * (velocity - uncond)
    return (latents + dsigma[:, None, None] * velocity).to(latents.dtype)


def _check(latents: Tensor, velocity: Tensor, dsigma: Tensor, uncond_velocity: Tensor | None) -> None:
    if latents.ndim != 3:
        raise ValueError(f"latents={tuple(latents.shape)}: must be [batch, tokens, channels]")
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity={tuple(velocity.shape)}: must be {tuple(latents.shape)} as latents")
    if dsigma.ndim != 1 or dsigma.shape[0] not in (1, latents.shape[0]):
        raise ValueError(f"dsigma={tuple(dsigma.shape)}: must be (1,) or ({latents.shape[0]},)")
    if latents.dtype in KERNEL_DTYPES and dsigma.dtype != torch.float32:
        raise ValueError(f"dsigma.dtype={dsigma.dtype}: must be torch.float32")
    if latents.dtype in KERNEL_DTYPES and velocity.dtype not in KERNEL_DTYPES:
        raise ValueError(f"velocity.dtype={velocity.dtype}: must be torch.float32 or torch.bfloat16")
    if uncond_velocity is None:
        return
    if uncond_velocity.shape != velocity.shape:
        raise ValueError(f"uncond_velocity={tuple(uncond_velocity.shape)}: must be {tuple(velocity.shape)} as velocity")
    if uncond_velocity.dtype != velocity.dtype:
        raise ValueError(f"uncond_velocity.dtype={uncond_velocity.dtype}: must be {velocity.dtype} as velocity")


# The entry of dsigma moves by one float each step: its alignment must not choose another compilation.
@triton.jit(do_not_specialize=["dsigma_ptr"])
def _step_kernel(
    latents_ptr, velocity_ptr, uncond_ptr, dsigma_ptr, out_ptr, N, dsigma_stride, true_cfg_scale,
    HAS_UNCOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    index = sample * N + offsets
    velocity = tl.load(velocity_ptr + index, mask=mask).to(tl.float32)
    if HAS_UNCOND:
        uncond = tl.load(uncond_ptr + index, mask=mask).to(tl.float32)
        velocity = uncond + true_cfg_scale * (velocity - uncond)
    latents = tl.load(latents_ptr + index, mask=mask).to(tl.float32)
    dsigma = tl.load(dsigma_ptr + sample * dsigma_stride)
    tl.store(out_ptr + index, latents + dsigma * velocity, mask=mask)


@torch.library.custom_op("uniworld::flow_step", mutates_args=())
def _step_op(
    latents: Tensor, velocity: Tensor, dsigma: Tensor, uncond_velocity: Tensor | None, true_cfg_scale: float
) -> Tensor:
    latents, velocity, dsigma = latents.contiguous(), velocity.contiguous(), dsigma.contiguous()
    uncond = velocity if uncond_velocity is None else uncond_velocity.contiguous()
    B, L, C = latents.shape
    out = torch.empty_like(latents)
    if out.numel() == 0:
        return out
    _step_kernel[(triton.cdiv(L * C, BLOCK), B)](
        latents, velocity, uncond, dsigma, out, L * C, 0 if dsigma.shape[0] == 1 else 1, true_cfg_scale,
        HAS_UNCOND=uncond_velocity is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@_step_op.register_fake
def _(latents, velocity, dsigma, uncond_velocity, true_cfg_scale):
    return torch.empty_like(latents, memory_format=torch.contiguous_format)


def _make_inputs(B, L, C, dtype, device, cfg=0, fp32_latents=0, shared_dsigma=0):
    return {
        "latents": torch.randn(B, L, C, dtype=torch.float32 if fp32_latents else dtype, device=device),
        "velocity": torch.randn(B, L, C, dtype=dtype, device=device),
        "dsigma": -torch.rand(1 if shared_dsigma else B, device=device),
        "uncond_velocity": torch.randn(B, L, C, dtype=dtype, device=device) if cfg else None,
        "true_cfg_scale": 3.0 if cfg else 1.0,
    }


def _build(has_uncond: bool) -> TritonBuild:
    signature = {
        "latents_ptr": "*fp32", "velocity_ptr": "*bf16", "uncond_ptr": "*bf16", "dsigma_ptr": "*fp32",
        "out_ptr": "*fp32", "N": "i32", "dsigma_stride": "i32", "true_cfg_scale": "fp32",
        "HAS_UNCOND": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    constexprs = {"HAS_UNCOND": has_uncond, "BLOCK": BLOCK}
    return TritonBuild(kernel=_step_kernel, signature=signature, constexprs=constexprs, num_warps=NUM_WARPS)


def _bytes_moved(case: dict[str, int]) -> int:
    latents_bytes = 4 if case.get("fp32_latents") else 2
    return (2 * latents_bytes + 2 + 2 * case.get("cfg", 0)) * case["B"] * case["L"] * case["C"]


register(
    Op(
        name="flow_step",
        fn=flow_step,
        reference=flow_step_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "L": 1, "C": 1},
            {"B": 3, "L": 37, "C": 64},
            {"B": 2, "L": 17, "C": 100, "fp32_latents": 1, "shared_dsigma": 1},
            {"B": 2, "L": 33, "C": 64, "cfg": 1, "fp32_latents": 1},
        ),
        bench_cases=(
            {"B": 1, "L": 4096, "C": 64, "fp32_latents": 1},
            {"B": 1, "L": 4096, "C": 64, "fp32_latents": 1, "cfg": 1},
        ),
        bytes_moved=_bytes_moved,
        flops=lambda c: (5 if c.get("cfg") else 2) * c["B"] * c["L"] * c["C"],
        triton_builds=(_build(has_uncond=False), _build(has_uncond=True)),
    )
)
