"""diffusers' FLUX with the weights of ours, in the same memory."""

import re
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from uniworld.kernels.attention_backends import SDPA_BACKENDS, choose_backend
from uniworld.models.flux import FluxConfig, FluxTransformer

MISSING = "diffusers is not installed"
# How diffusers calls the libraries that ours may choose; "flash4" is one that it would have to download.
DIFFUSERS_NAMES = {"flash3": "_flash_3", "flash2": "flash", "xformers": "xformers"}
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
ATTENTION_OP = re.compile(
    r"(?!\w+::\w*backward)(?:aten::_scaled_dot_product_(?:attention_)?(\w+?)(?:_attention)?(?:_for_cpu)?"
    r"|(?:uniworld|flash_attn\w*|xformers\w*)::(\w*(?:attention|flash|fmha|fwd)\w*))"
)


def random_flux(config: FluxConfig, dtype: torch.dtype, device: str, seed: int = 0) -> FluxTransformer:
    """Ours with random weights, made on the device: no copy of 12 B parameters ever stands in host memory.

    Matrices keep activations at their size, adaLN linears half of it; values are those of bf16 in every dtype, so that
    one fp64 run is the truth for all of them.
    """
    with torch.device("meta"):
        model = FluxTransformer(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    fill_random(model, seed)
    return model


@torch.no_grad()
def fill_random(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: matrices of unit gain, biases small, norm scales near one."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        std = 0.1 if p.ndim == 1 else p[0].numel() ** -0.5 * (0.5 if ".norm" in f".{name}" else 1.0)
        for part in p.view(p.shape[0], -1).split(max(1, 2**26 // max(1, p[0].numel()))):  # bounds the fp32 copy
            noise = torch.randn(part.shape, generator=generator, device=device) * std
            if p.ndim == 1 and name.endswith("weight"):
                noise += 1
            part.copy_(noise.to(torch.bfloat16))


def our_attention(model: FluxTransformer, device: str, dtype: torch.dtype) -> str:
    """The backend that ours chooses by itself."""
    return choose_backend("auto", torch.device(device), dtype, model.config.attention_head_dim).name


def diffusers_flux(ours: FluxTransformer, device: str, attention: str = ""):
    """diffusers' model of the same sizes whose parameters are views of ours: q, k and v are row blocks of `to_qkv`.

    Where `attention` is a library's name, it attends through that; for torch's own kernels see `same_attention`.
    """
    from diffusers import FluxTransformer2DModel

    config = ours.config
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            in_channels=config.in_channels,
            num_layers=config.num_layers,
            num_single_layers=config.num_single_layers,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            joint_attention_dim=config.joint_attention_dim,
            pooled_projection_dim=config.pooled_projection_dim,
            guidance_embeds=config.guidance_embeds,
            axes_dims_rope=config.axes_dims_rope,
        )
    theirs.load_state_dict(split_qkv(dict(ours.named_parameters())), strict=True, assign=True)
    theirs.eval().requires_grad_(False)
    if attention in DIFFUSERS_NAMES:
        theirs.set_attention_backend(DIFFUSERS_NAMES[attention])
    return theirs.to(device) if any(True for _ in theirs.buffers()) else theirs  # its parameters are where ours are


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and fused matrices -> diffusers' names, as views."""
    split = {}
    for key, value in state.items():
        names = ()
        if ".add_qkv_proj." in key:
            names = [key.replace("add_qkv_proj", f"add_{part}_proj") for part in "qkv"]
        elif ".to_qkv." in key:
            names = [key.replace("to_qkv", f"to_{part}") for part in "qkv"]
        split |= dict(zip(names, value.detach().chunk(3))) if names else {key: value.detach()}
    return split


def run_diffusers(model, img: Tensor, txt: Tensor, pooled: Tensor, timestep: Tensor, guidance: Tensor, img_ids: Tensor):
    """One prediction [B, L_img, C] of diffusers' model, from the inputs of `FluxTransformer.forward`."""
    return model(
        hidden_states=img,
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=timestep,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=torch.zeros(txt.shape[1], 3, device=img.device, dtype=img_ids.dtype),
        return_dict=False,
    )[0]


def same_attention(device: str, backend: str = "cudnn"):
    """On a GPU the kernel inside torch that ours has chosen, where it is one, and else cuDNN's comes first; on a CPU
    nothing changes."""
    if device != "cuda":
        return nullcontext()
    first = SDPA_BACKENDS.get(backend, SDPBackend.CUDNN_ATTENTION)
    order = [first, *(other for other in SDPA_ORDER if other != first)]
    return sdpa_kernel(order, set_priority=True)  # not every attention of the encoders fits cuDNN


def attention_kernels(call: Callable[[], object]) -> str:
    """Which attention a call runs, as torch's profiler sees it: "cudnn", "flash", ...; "" where it sees none.

    Backward passes do not count. The call is made once.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    found = (ATTENTION_OP.fullmatch(event.key) for event in seen.key_averages())
    return ", ".join(dict.fromkeys(op[1] or op[2] for op in found if op))


def relative_error(prediction: Tensor, truth: Tensor) -> float:
    """||prediction - truth|| / ||truth||."""
    difference = prediction.double().cpu() - truth.double().cpu()
    return float(difference.norm() / truth.double().norm().cpu())
