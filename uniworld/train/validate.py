"""Pictures drawn during training with the averaged weights, as one labelled grid a time in `run_dir/validation`."""

import contextlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from uniworld.config import TrainConfig, ValidationConfig
from uniworld.engine.engine import Engine
from uniworld.engine.request import Request
from uniworld.models.image_size import output_size
from uniworld.models.images import read_image
from uniworld.models.unified import UniWorld
from uniworld.train.ema import ShardedEMA
from uniworld.train.sharding import World

CELL_PX, MARGIN_PX = 320, 12
MAX_CAPTION_LINES = 4


def run(config: TrainConfig, model: UniWorld | None, ema: ShardedEMA | None, world: World, step: int) -> Path | None:
    """Draw the pictures of `config.validation` and save their grid; all ranks call it, rank 0 draws.

    Training goes on as if nothing had happened: parameters, random generators and attention backend are as before.
    Under ZeRO 3, where no rank holds all parameters, every rank draws and rank 0 keeps the result.

    Args:
        model: whose modules are trained; None on ranks that hold no encoders.
        ema: the average to draw with; None draws with the weights as they are.

    Returns: the file, on rank 0.
    Raises: ValueError where drawing or saving failed, on all ranks.
    """
    draws = world.rank == 0 or config.sharding.zero_stage == 3
    weights = contextlib.nullcontext() if ema is None else ema.swapped_in()
    path = Path(config.run_dir) / "validation" / f"step-{step:06d}.png"
    error = None
    with weights:
        try:
            if draws:
                pictures = draw(config, model)
                if world.rank == 0:
                    which = "averaged weights" if ema is not None else "current weights"
                    save(grid(config.validation, pictures, f"step {step}, {which}"), path)
        except (ValueError, OSError, RuntimeError) as failure:
            error = failure
        failed = world.agree(0 if error is None else 1)  # the others wait here for rank 0
    if error is not None:
        raise ValueError(f"validation at step {step}: {error}") from error
    if failed:
        raise ValueError(f"validation at step {step}: failed on another rank; see its error")
    return path if world.rank == 0 else None


def check(config: TrainConfig) -> None:
    """Find out before the first step what would end the run at the first validation.

    Raises: ValueError or FileNotFoundError naming the field.
    """
    every = config.validation.every_steps
    if every and not config.validation.prompts:
        raise ValueError(f"validation.every_steps={every}: needs validation.prompts")
    if every:
        requests(config)


def draw(config: TrainConfig, model: UniWorld) -> list[Image.Image]:
    """One picture a prompt, always from the same noise, of the area that is trained on."""
    backend, state = model.denoiser.attention_backend, torch.get_rng_state()
    try:
        engine = Engine(model, attention=backend, max_batch_size=1, cuda_graphs=False)  # memory is the training's
        return [engine.run([request])[0].images[0] for request in requests(config)]
    finally:
        torch.set_rng_state(state)
        model.denoiser.attention_backend = backend


def requests(config: TrainConfig) -> list[Request]:
    """What is drawn; made anew each time, as a request holds its pictures."""
    validation, found = config.validation, []
    references = [(read_image(path),) for path in validation.images] or [()] * len(validation.prompts)
    for prompt, images in zip(validation.prompts, references):
        in_height, in_width = (images[0].height, images[0].width) if images else (1, 1)
        height, width = output_size(in_height, in_width, config.data.anchor_px)
        found.append(
            Request(
                prompt=prompt,
                images=images,
                height=height,
                width=width,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                seed=validation.seed,
            )
        )
    return found


def grid(config: ValidationConfig, pictures: Sequence[Image.Image], title: str) -> Image.Image:
    """A column a prompt: its reference above where there is one, the picture, and the prompt below."""
    rows = [[read_image(path) for path in config.images]] if config.images else []
    rows.append(list(pictures))
    font = ImageFont.load_default(size=15)
    line_px = sum(font.getmetrics()) + 2
    step_px = CELL_PX + MARGIN_PX
    top = MARGIN_PX + line_px + MARGIN_PX
    captions_top = top + len(rows) * step_px
    width = MARGIN_PX + len(pictures) * step_px
    sheet = Image.new("RGB", (width, captions_top + MAX_CAPTION_LINES * line_px + MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX), title, fill="black", font=font)
    for column, prompt in enumerate(config.prompts):
        left = MARGIN_PX + column * step_px
        for row, images in enumerate(rows):
            cell = images[column].convert("RGB")
            cell.thumbnail((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
            at = left + (CELL_PX - cell.width) // 2, top + row * step_px + (CELL_PX - cell.height) // 2
            sheet.paste(cell, at)
        pen.multiline_text((left, captions_top), wrapped(prompt, font), fill="black", font=font, spacing=2)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont) -> str:
    """`text` in lines as wide as a cell, cut off after a few."""
    num_letters = max(1, int(CELL_PX / font.getlength("n")))
    lines = textwrap.wrap(text, num_letters)
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], lines[MAX_CAPTION_LINES - 1][: num_letters - 1] + "…"]
    return "\n".join(lines)


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears under its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
