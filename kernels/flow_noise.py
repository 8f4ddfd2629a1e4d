"""flow_noise: the noisy latents and the velocity target of a training step, both packed 2x2, in one pass.

Letters: B batch, C latent channels, h, w latent height and width, L = (h / 2)(w / 2) packed tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniworld.kernels.registry import KERNEL_DTYPES, Op, TritonBuild, backend_for, register

BLOCK = 1024
NUM_WARPS = 4


def flow_noise(
    latents: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """z = (1 - sigma) * latents + sigma * noise and the target noise - latents, packed as FLUX does.

    Both inputs are data, so there is no backward.

    Args:
        latents: [B, C, h, w], fp32 or bf16; h and w even.
        noise: [B, C, h, w], dtype of latents.
        sigma: [B] fp32, in [0, 1].
        dtype: of z, fp32 or bf16; the latents' by default.

    Returns: z [B, L, 4C] in `dtype` and the target [B, L, 4C] in the latents' dtype; channel index c * 4 + dy * 2 + dx.
        The arithmetic is done in fp32 (the dtype of sigma) and rounded once.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    _check(latents, noise, sigma, dtype)
    if backend_for(latents) == "torch":
        return flow_noise_reference(latents, noise, sigma, dtype)
    return _noise_op(latents, noise, sigma, dtype)


def flow_noise_reference(
    latents: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    sigma = sigma[:, None, None, None]
    noisy = (1 - sigma) * latents + sigma * noise
    return pack(noisy.to(dtype or latents.dtype)), pack(noise - latents)


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h / 2)(w / 2), 4C]: 2x2 neighbours become channels, index c * 4 + dy * 2 + dx."""
    B, C, h, w = x.shape
    return x.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, (h // 2) * (w // 2), C * 4)


def _check(latents: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None) -> None:
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(f"latents={tuple(latents.shape)}: must be [batch, channels, h, w] with even h and w")
    if noise.shape != latents.shape or noise.dtype != latents.dtype:
        got, wanted = (tuple(noise.shape), noise.dtype), (tuple(latents.shape), latents.dtype)
        raise ValueError(f"noise={got}: must be {wanted} as latents")
    if tuple(sigma.shape) != (latents.shape[0],):
        raise ValueError(f"sigma={tuple(sigma.shape)}: must be ({latents.shape[0]},)")
    if latents.dtype not in KERNEL_DTYPES:
        return
    if sigma.dtype != torch.float32:
        raise ValueError(f"sigma.dtype={sigma.dtype}: must be torch.float32")
    if dtype is not None and dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype={dtype}: must be torch.float32 or torch.bfloat16")


@triton.jit
def _noise_kernel(latents_ptr, noise_ptr, sigma_ptr, noisy_ptr, target_ptr, C, h, w, BLOCK: tl.constexpr):
    # Programs walk the packed order, so that stores are contiguous; the pixel pairs read are neighbours.
    sample = tl.program_id(1).to(tl.int64)
    N = C * h * w
    packed = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = packed < N
    token, channel = packed // (4 * C), packed % (4 * C)
    row = token // (w // 2) * 2 + channel // 2 % 2
    column = token % (w // 2) * 2 + channel % 2
    source = sample * N + (channel // 4 * h + row) * w + column
    latents = tl.load(latents_ptr + source, mask=mask).to(tl.float32)
    noise = tl.load(noise_ptr + source, mask=mask).to(tl.float32)
    sigma = tl.load(sigma_ptr + sample)
    tl.store(noisy_ptr + sample * N + packed, (1.0 - sigma) * latents + sigma * noise, mask=mask)
    tl.store(target_ptr + sample * N + packed, noise - latents, mask=mask)


@torch.library.custom_op("uniworld::flow_noise", mutates_args=())
def _noise_op(latents: Tensor, noise: Tensor, sigma: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    latents, noise, sigma = latents.contiguous(), noise.contiguous(), sigma.contiguous()
    B, C, h, w = latents.shape
    noisy = latents.new_empty(B, h * w // 4, 4 * C, dtype=dtype or latents.dtype)
    target = latents.new_empty(B, h * w // 4, 4 * C)
    if target.numel():
        grid = (triton.cdiv(C * h * w, BLOCK), B)
        _noise_kernel[grid](latents, noise, sigma, noisy, target, C, h, w, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return noisy, target


@_noise_op.register_fake
def _(latents, noise, sigma, dtype):
    B, C, h, w = latents.shape
    target = latents.new_empty(B, (h // 2) * (w // 2), 4 * C)
    return torch.empty_like(target, dtype=dtype or latents.dtype), target


def _make_inputs(B, C, h, w, dtype, device):
    return {
        "latents": torch.randn(B, C, h, w, dtype=dtype, device=device),
        "noise": torch.randn(B, C, h, w, dtype=dtype, device=device),
        "sigma": torch.rand(B, device=device),
    }


register(
    Op(
        name="flow_noise",
        fn=flow_noise,
        reference=flow_noise_reference,
        make_inputs=_make_inputs,
        cases=(
            {"B": 1, "C": 1, "h": 2, "w": 2},
            {"B": 3, "C": 5, "h": 14, "w": 6},
            {"B": 2, "C": 16, "h": 10, "w": 22},
        ),
        bench_cases=({"B": 1, "C": 16, "h": 128, "w": 128},),
        bytes_moved=lambda c: 4 * 2 * c["B"] * c["C"] * c["h"] * c["w"],
        flops=lambda c: 4 * c["B"] * c["C"] * c["h"] * c["w"],
        triton_builds=(
            TritonBuild(
                kernel=_noise_kernel,
                signature={
                    "latents_ptr": "*fp32", "noise_ptr": "*fp32", "sigma_ptr": "*fp32", "noisy_ptr": "*bf16",
                    "target_ptr": "*fp32", "C": "i32", "h": "i32", "w": "i32", "BLOCK": "constexpr",
                },  # fmt: skip
                constexprs={"BLOCK": BLOCK},
                num_warps=NUM_WARPS,
            ),
        ),
    )
)
