"""diffusers' FLUX with the weights of ours, in the same memory."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from uniworld.models.flux import FluxConfig, FluxTransformer

MISSING = "diffusers is not installed"


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


def diffusers_flux(ours: FluxTransformer, device: str):
    """diffusers' model of the same sizes whose parameters are views of ours: q, k and v are row blocks of `to_qkv`."""
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


def same_attention(device: str):
    """On a GPU cuDNN's attention first, so that both sides use the fastest exact one that torch holds; else nothing."""
    if device != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)  # not every attention of the encoders fits cuDNN


def relative_error(prediction: Tensor, truth: Tensor) -> float:
    """||prediction - truth|| / ||truth||."""
    difference = prediction.double().cpu() - truth.double().cpu()
    return float(difference.norm() / truth.double().norm().cpu())
