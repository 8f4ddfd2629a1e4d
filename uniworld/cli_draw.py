"""What `edit`, `generate`, `perceive` and `convert` do."""

import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from uniworld.cli_options import DrawOptions, LoadOptions, ReportOptions, parse_lora

if TYPE_CHECKING:
    from PIL import Image

    from uniworld.engine import Engine, Request, Result, StepInfo

NOISE_NOTE = (
    "note: the weights of model {model!r} are random, nothing was trained: "
    "the picture is noise and shows only that the whole pipeline runs"
)

OPTION_OF_FIELD = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "seed": "--seed",
    "cache_threshold": "--cache-threshold",
    "cache_interval": "--cache-interval",
    "cache_order": "--cache-order",
}

Draw = Callable[["Engine", Sequence["Image.Image"], dict[str, Any]], "Result"]


def edit(
    paths: Sequence[Path], prompt: str, output: Path, load: LoadOptions, drawing: DrawOptions, report: ReportOptions
) -> None:
    def draw(engine: "Engine", images: Sequence["Image.Image"], settings: dict[str, Any]) -> "Result":
        return engine.edit(images, prompt, **settings)

    _draw_to_file(draw, prompt, paths, output, load, drawing, report)


def generate(prompt: str, output: Path, load: LoadOptions, drawing: DrawOptions, report: ReportOptions) -> None:
    def draw(engine: "Engine", images: Sequence["Image.Image"], settings: dict[str, Any]) -> "Result":
        return engine.generate(prompt, **settings)

    _draw_to_file(draw, prompt, (), output, load, drawing, report)


def perceive(
    path: Path,
    task: str,
    target: str | None,
    output: Path,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    from uniworld.models.prompts import perception_prompt

    prompt = perception_prompt(task, target)  # refuses an unknown task before anything is loaded

    def draw(engine: "Engine", images: Sequence["Image.Image"], settings: dict[str, Any]) -> "Result":
        return engine.perceive(images[0], task, target=target, **settings)

    _draw_to_file(draw, prompt, (path,), output, load, drawing, report)


def _draw_to_file(
    draw: Draw,
    prompt: str,
    paths: Sequence[Path],
    output: Path,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    """Check everything that can be checked without weights, load, draw, and write the picture in one move."""
    from uniworld.engine.parallel import is_first_process
    from uniworld.models.images import check_writable, read_image, write_image

    settings = drawing.settings()
    check_writable(output)
    writes = not load.sequence_parallel or is_first_process()
    if not writes:
        report = ReportOptions(quiet=True)
    console = stderr_console(report)
    with plain_warnings(console):
        images = [read_image(path) for path in paths]
        first = checked_request(prompt, images, settings)
        engine, load_s = load_engine(load, drawing.t5, report, first)
        if writes:
            note_random_weights(engine, NOISE_NOTE)
        with step_progress(console) as on_step:
            result = draw(engine, images, {**settings, "on_step": on_step})
        if not writes:
            return
        write_image(result.images[0], output)
    print_drawn(console, result)
    if report.verbose:
        print_timings(console, {"load": load_s, **result.timings}, result.num_inference_steps)
        console.print(f"steps run as: {result.graphs}", markup=False)
        console.print(f"in host memory: {result.offload}", markup=False)
    print(output, flush=True)


def stderr_console(report: ReportOptions) -> Console:
    return Console(stderr=True, quiet=report.quiet, highlight=False, soft_wrap=True)


def checked_request(prompt: str, images: Sequence["Image.Image"], settings: dict[str, Any]) -> "Request":
    """The request; or, in terms of our options, the ValueError that the engine would raise once a model is loaded."""
    from uniworld.engine import Request

    try:
        return Request(prompt=prompt, images=tuple(images), **settings)
    except ValueError as error:
        field, equals, rest = str(error).partition("=")
        if equals and field in OPTION_OF_FIELD:
            raise ValueError(f"{OPTION_OF_FIELD[field]} {rest}") from error
        raise


def load_engine(
    load: LoadOptions, use_t5: bool | None, report: ReportOptions, first: "Request | None" = None
) -> tuple["Engine", float]:
    """The engine that the options ask for, and the seconds it took to load, and to encode the `first` request in."""
    import torch

    from uniworld.checkpoint.lora_files import find_file
    from uniworld.engine import Engine
    from uniworld.engine.lora import NO_ERRORS
    from uniworld.engine.parallel import join_launched

    silence_libraries()
    start = time.perf_counter()
    loras = [parse_lora(text) for text in load.lora or ()]
    if loras and load.report_error and load.quantize:
        raise ValueError(f"--lora {load.lora[0]}: {NO_ERRORS}")
    files = [find_file(path) for path, _ in loras]
    device, group = checked_device(load.device), None
    if load.sequence_parallel:
        group, device = join_launched(device)
    engine = Engine.from_pretrained(
        model=load.model,
        flux=load.flux,
        siglip=load.siglip,
        device=device,
        dtype=None if load.dtype == "auto" else getattr(torch, load.dtype.value),
        attention=load.attention,
        progress=not report.quiet,
        check_finite=load.check_finite,
        use_t5=use_t5,
        cuda_graphs="auto" if load.cuda_graphs == "auto" else load.cuda_graphs == "on",
        compile=load.compile,
        sequence_parallel=group,
        quantize=load.quantize,
        quantize_exclude=load.quantize_exclude or (),
        report_error=load.report_error,
        offload=load.offload,
        first_request=first,
    )
    for file, (path, scale) in zip(files, loras):
        engine.load_lora(file, name=path, scale=scale)
    return engine, time.perf_counter() - start


def checked_device(name: str | None) -> str | None:
    """The device as given, if this machine has it.

    Raises:
        ValueError: torch knows no such device, or there is none here.
    """
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: must be cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here")
    return name


def silence_libraries() -> None:
    """Keep the libraries' own advice off the terminal; UNIWORLD_DEBUG=1 leaves it on."""
    if os.environ.get("UNIWORLD_DEBUG") == "1":
        return
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it sets its logger's level itself when it is imported
    # The last three tell of optional kernels that they lack, whenever they are installed.
    for name in ("transformers", "diffusers", "huggingface_hub", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def note_random_weights(engine: "Engine", note: str) -> None:
    """Say it even with --quiet: who sees noise must know why."""
    if engine.model.random_weights:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            note.format(model=engine.model.name), style="yellow", markup=False
        )


@contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Show our own warnings as one `note:` line, and those of libraries not at all."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if issubclass(category, UserWarning) and "uniworld" in Path(filename).parts:
            console.print(f"note: {message}", style="yellow", markup=False)

    with warnings.catch_warnings():
        if os.environ.get("UNIWORLD_DEBUG") != "1":
            warnings.showwarning = show
        yield


@contextmanager
def step_progress(console: Console, at_once: bool = True) -> Iterator[Callable[["StepInfo"], None]]:
    """A bar over the denoising steps on stderr; gives the callback that moves it.

    at_once: show it before the first step, which comes after the images and the prompt are read.
    """
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, transient=console.is_terminal)
    bar = progress.add_task("reading", total=None)

    def on_step(info: "StepInfo") -> None:
        progress.start()
        description = "decoding" if info.step == info.num_inference_steps else "drawing"
        progress.update(bar, total=info.num_inference_steps, completed=info.step, description=description)

    try:
        if at_once:
            progress.start()
        yield on_step
    finally:
        if progress.live.is_started:
            progress.stop()


def print_drawn(console: Console, result: "Result") -> None:
    seconds = result.timings["total"]
    steps = f"{result.num_inference_steps} step{'s' if result.num_inference_steps > 1 else ''}"
    if result.step_cache is not None:
        steps += f" ({result.step_cache.num_computed} computed)"
    console.print(f"{result.width}x{result.height} px, {steps}, seed {result.seed}, {seconds:.1f} s")
    if result.step_errors:
        errors = " ".join(f"{error:.1e}" for error in result.step_errors)
        console.print(f"error of each step against all blocks, unquantized: {errors}")


def print_timings(console: Console, timings: dict[str, float], num_inference_steps: int | None = None) -> None:
    """A table of seconds by room; loading is not part of the total. Text answers have no steps."""
    table = Table("room", "seconds", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for room, seconds in timings.items():
        table.add_row(room, f"{seconds:.3f}")
    if num_inference_steps is not None:
        table.add_row("denoise, a step", f"{timings['denoise'] / num_inference_steps:.3f}")
    console.print(table)


def free_name(stem: str) -> Path:
    """`<stem>.png`, or `<stem>-2.png` and so on where that is taken."""
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{i}.png" for i in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def convert(
    qwen: str,
    flux: str,
    output: Path,
    *,
    siglip: str | None,
    connectors: Path | None,
    seed: int,
    overwrite: bool,
    report: ReportOptions,
) -> None:
    """Make a starting checkpoint and print its folder."""
    from uniworld.checkpoint.convert import convert as convert_checkpoint

    silence_libraries()
    start = time.perf_counter()
    taken = {"siglip": siglip, "connectors": connectors}
    convert_checkpoint(qwen, flux, output, **taken, seed=seed, overwrite=overwrite, progress=not report.quiet)
    if report.verbose:
        print_timings(stderr_console(report), {"convert": time.perf_counter() - start})
    print(output, flush=True)
