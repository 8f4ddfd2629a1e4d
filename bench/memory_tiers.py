"""Writes the tables of docs/memory.md: what UniWorld-V1 at full size needs, by arithmetic on shapes. Nothing is run.

    python bench/memory_tiers.py          rewrite the tables
    python bench/memory_tiers.py --check  exit 1 where they do not agree
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from full_model import FULL_SIZE, random_uniworld
from tables import MARKS, table, update
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from uniworld.engine.offload import GROUPS, LEVELS, modules_of, num_bytes, weight_bytes, weights_of
from uniworld.engine.quantize import KINDS, quantized_copy
from uniworld.kernels.registry import use_backend
from uniworld.models import flow
from uniworld.models.flux import FluxTransformer
from uniworld.models.unified import UniWorld
from uniworld.train.memory import LiveBytes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
DTYPE = torch.bfloat16
GIB = 2**30
SIZES_PX = (512, 1024)
NUM_TXT = 1600  # words, one reference picture of 1,024 semantic tokens and T5


def gib(num: int) -> str:
    return f"{num / GIB:.2f}"


def parts_table(model: UniWorld) -> str:
    """Bytes of the unquantized parts."""
    modulation = weights_of(model.denoiser.modulation_linears())
    texts = model.text_encoders
    parts = {
        "DiT, blocks and rest": num_bytes(weights_of([model.denoiser])) - num_bytes(modulation),
        "DiT, modulation": num_bytes(modulation),
        "Qwen2.5-VL-7B": num_bytes(weights_of([model.vlm])),
        "T5-XXL (left out by `use_t5=False`)": num_bytes(weights_of([texts.t5])),
        "CLIP-L, SigLIP2, connectors": num_bytes(
            weights_of([texts.clip, model.semantic_encoder, *modules_of(model, GROUPS["connectors"])])
        ),
        "VAE": num_bytes(weights_of([model.vae])),
    }
    parts["all"] = sum(parts.values())
    return table(("part, bfloat16", "GiB"), [(name, gib(size)) for name, size in parts.items()])


def tiers(model: UniWorld) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(quantize, offload, bytes by what is on the device) of every tier."""
    exact = model.denoiser
    for kind in (None, *KINDS):
        model.denoiser = exact if kind is None else quantized_copy(exact, kind)
        for level in (None, *LEVELS):
            yield kind or "none", level or "none", weight_bytes(model, level)
    model.denoiser = exact


def tiers_table(model: UniWorld) -> str:
    header = ("quantize", "offload", "VLM runs", "T5 and CLIP run", "DiT runs", "VAE runs", "largest", "in host memory")
    rows = []
    for kind, level, sizes in tiers(model):
        shown = [sizes[group] for group in ("vlm", "text_encoders", "denoise", "decode")]
        largest = max(sizes[group] for group in GROUPS)
        rows.append((kind, level, *map(gib, (*shown, largest, sizes["host"]))))
    return table(header, rows)


def activations_table(model: UniWorld) -> str:
    """Peak bytes of live tensors on top of weights, traced with shapes alone."""
    header = ("size, one picture", "one step of the DiT", "decoding")
    rows = [(f"{size} px", gib(trace_step(model, size)), gib(trace_decoding(model, size))) for size in SIZES_PX]
    return table(header, rows)


def fake_copies(module: nn.Module) -> None:
    """Tensors of the current `FakeTensorMode` in the place of those on meta."""
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None:
                owner._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=DTYPE), requires_grad=False)


def trace_step(model: UniWorld, size_px: int) -> int:
    config = model.denoiser.config
    with torch.device("meta"):
        denoiser = FluxTransformer(config)
    with FakeTensorMode(), torch.no_grad(), use_backend("triton"):
        fake_copies(denoiser)
        num_img = (size_px // flow.TOKEN_PX) ** 2
        img = torch.empty(1, num_img, config.in_channels, dtype=DTYPE)
        txt = torch.empty(1, NUM_TXT, config.dim, dtype=DTYPE)
        row = torch.empty(1, config.num_modulations * config.dim, dtype=DTYPE)
        pe = denoiser.rope(torch.empty(num_img, len(config.axes_dims_rope)))
        with LiveBytes(denoiser.parameters()) as live:
            denoiser.denoise(img, txt, row, pe)
        return live.peak


def trace_decoding(model: UniWorld, size_px: int) -> int:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(model.vae.model.config)).eval()
    with FakeTensorMode(), torch.no_grad():
        fake_copies(vae)
        latents = torch.empty(1, vae.config.latent_channels, size_px // 8, size_px // 8, dtype=DTYPE)
        with LiveBytes(vae.parameters()) as live:
            vae.decode(latents)
        return live.peak


TABLES = {"parts": parts_table, "tiers": tiers_table, "activations": activations_table}


def render(page: str) -> str:
    """The page with every table made anew."""
    model = random_uniworld(FULL_SIZE, "meta", DTYPE)
    return MARKS.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](model)}\n{match[3]}", page)


if __name__ == "__main__":
    update(render, "memory_tiers.py", PAGE)
