"""Options that several commands share, declared once.

A group is a dataclass whose fields are typer options. `with_options(load=LoadOptions)` gives a command all options of
the group and hands it the values as one object.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL_PANEL = "Model"
DRAW_PANEL = "Drawing"
OUTPUT_PANEL = "Output"


class Dtype(StrEnum):
    """Floating-point formats that the model can be loaded in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class CudaGraphs(StrEnum):
    """Whether steps are replayed as CUDA graphs."""

    auto = "auto"
    on = "on"
    off = "off"


class Cache(StrEnum):
    """Ways to leave out blocks of some steps."""

    first_block = "first_block"
    taylor = "taylor"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model, where and how."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="tiny|DIR|HUB-ID", help="UniWorld-V1 checkpoint.", rich_help_panel=MODEL_PANEL
        ),
    ] = "tiny"
    flux: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB-ID",
            help="FLUX.1-dev folder (VAE, T5, CLIP); default: flux/ beside the weights.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    siglip: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|HUB-ID",
            help="SigLIP2 folder; default: siglip/ beside the weights.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda|cuda:N", help="Default: the first GPU, else the CPU.", rich_help_panel=MODEL_PANEL
        ),
    ] = None
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.", rich_help_panel=MODEL_PANEL)] = (
        Dtype.auto
    )
    attention: Annotated[
        str,
        typer.Option(metavar="NAME", help="Attention backend; `uniworld env` lists them.", rich_help_panel=MODEL_PANEL),
    ] = "auto"
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="fp8|nf4",
            help="Fewer bits for the DiT's blocks: fp8 (sm_89 and newer) or nf4 (bitsandbytes).",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    quantize_exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Weights that stay as they are, 'transformer_blocks.0.*' for one; can be repeated.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    report_error: Annotated[
        bool,
        typer.Option(
            "--report-error",
            help="With --quantize or --cache: also run all blocks, unquantized, and show how far each step is off.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="auto|modulation|parts|cpu",
            help="What waits in host memory until used; same pictures, less GPU memory. auto: the least that fits.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Refuse weights that hold NaN or infinity.", rich_help_panel=MODEL_PANEL),
    ] = False
    cuda_graphs: Annotated[
        CudaGraphs,
        typer.Option(
            metavar="auto|on|off",
            help="Replay steps as CUDA graphs; auto: where it can be done, and -v says where not.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = CudaGraphs.auto
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="LoRA of the DiT: a file, folder or Hub id, such as cat.safetensors:0.8; may be repeated.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the DiT's blocks first: worth it for many pictures in one process.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False
    sequence_parallel: Annotated[
        bool,
        typer.Option(
            "--sequence-parallel",
            help="Draw one picture on several GPUs; start with `torchrun --nproc-per-node N -m uniworld.cli`.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False

    def refuse_sequence_parallel(self) -> None:
        """Raise in commands that do more than draw one picture."""
        if self.sequence_parallel:
            raise ValueError("--sequence-parallel: only edit, generate and perceive can run on several GPUs")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How a picture is drawn."""

    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.", rich_help_panel=DRAW_PANEL)] = None
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps; default: the model's own, or 28.", rich_help_panel=DRAW_PANEL, show_default=False
        ),
    ] = None
    size: Annotated[
        str,
        typer.Option(
            metavar="WxH|auto",
            help="Multiples of 16 px; auto takes the first image's nearest aspect ratio.",
            rich_help_panel=DRAW_PANEL,
        ),
    ] = "auto"
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Embedded guidance of FLUX.1-dev; default: the model's own, or 3.5.",
            rich_help_panel=DRAW_PANEL,
            show_default=False,
        ),
    ] = None
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to avoid; needs --true-cfg.", rich_help_panel=DRAW_PANEL)
    ] = None
    true_cfg: Annotated[
        float,
        typer.Option(help="True classifier-free guidance, twice the work; 1 is off.", rich_help_panel=DRAW_PANEL),
    ] = 1.0
    t5: Annotated[
        bool | None,
        typer.Option(
            "--t5/--no-t5",
            help="T5 text states beside the VLM's; default: on where the FLUX folder holds T5.",
            rich_help_panel=DRAW_PANEL,
            show_default=False,
        ),
    ] = None
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.", rich_help_panel=DRAW_PANEL)
    ] = False
    cache: Annotated[
        Cache | None,
        typer.Option(
            help="Leave out blocks of some steps: faster, and the picture changes.",
            rich_help_panel=DRAW_PANEL,
            show_default=False,
        ),
    ] = None
    cache_threshold: Annotated[
        float,
        typer.Option(
            help="first_block: reuse below this relative change; 0 computes every step.", rich_help_panel=DRAW_PANEL
        ),
    ] = 0.08
    cache_interval: Annotated[
        int, typer.Option(help="taylor: compute one step of so many.", rich_help_panel=DRAW_PANEL)
    ] = 3
    cache_order: Annotated[
        int, typer.Option(help="taylor: degree of the extrapolation.", rich_help_panel=DRAW_PANEL)
    ] = 1

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `Engine.edit` and its siblings."""
        if self.negative is not None and self.true_cfg == 1:
            raise ValueError("--negative: only has an effect with --true-cfg above 1, for example --true-cfg 4")
        width, height = parse_size(self.size)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "true_cfg_scale": self.true_cfg,
            "negative_prompt": self.negative,
            "seed": self.seed,
            "use_t5": self.t5,
            "vae_tiling": self.vae_tiling,
            "cache": None if self.cache is None else self.cache.value,
            "cache_threshold": self.cache_threshold,
            "cache_interval": self.cache_interval,
            "cache_order": self.cache_order,
        }


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is said on stderr."""

    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show seconds by room.", rich_help_panel=OUTPUT_PANEL)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes.", rich_help_panel=OUTPUT_PANEL)
    ] = False


OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
        help=".png, .jpg or .webp; an existing file is replaced. Default: a free name in this folder.",
    ),
]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
]


def parse_size(text: str) -> tuple[int | None, int | None]:
    """`1024x768` -> (1024, 768), width first; `auto` -> (None, None).

    Raises:
        ValueError: neither form.
    """
    if text.lower() == "auto":
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {text}: must be WIDTHxHEIGHT in pixels, for example 512x768, or auto")
    return int(width), int(height)


def parse_lora(text: str) -> tuple[str, float]:
    """`cat.safetensors:0.8` -> ("cat.safetensors", 0.8); without a scale it is 1."""
    path, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        raise ValueError(f"--lora {text}: {scale} is no scale, must be a number such as {path}:0.8") from None


def with_options(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameters named in `groups` by the options of each group.

    Args:
        groups: parameter name -> dataclass whose fields are `Annotated[..., typer.Option(...)]` with defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {
                name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()
            }
            command(**values, **made)

        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for group in groups.values()
            for f in fields(group)
        ]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature(own + shared)
        run.__annotations__ = {p.name: p.annotation for p in own + shared}
        del run.__wrapped__  # typer would follow it to the original parameters
        return run

    return decorate
