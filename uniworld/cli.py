"""The command line. Torch and transformers are imported inside the commands, so that `--help` is immediate."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from uniworld.cli_make_data import make_data
from uniworld.cli_options import (
    OUTPUT_PANEL,
    DrawOptions,
    LoadOptions,
    OutputFile,
    Overrides,
    ReportOptions,
    with_options,
)
from uniworld.version import __version__

EXIT_USER_ERROR = 2
EXIT_BUG = 1
EXIT_CANCELLED = 130

app = typer.Typer(
    help="UniWorld-V1: one model that understands, generates, edits and perceives images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ChatMode(StrEnum):
    """Who decides between a picture and text."""

    auto = "auto"
    image = "image"
    text = "text"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"uniworld {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    local_rank: Annotated[  # the deepspeed launcher puts it first; the environment says the same
        int | None, typer.Option("--local_rank", hidden=True)
    ] = None,
) -> None:
    pass


@app.command()
@with_options(load=LoadOptions, drawing=DrawOptions, report=ReportOptions)
def edit(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="One or several reference images.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The instruction, in quotes.")],
    output: OutputFile = None,
    *,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    """Edit a picture, or compose several, by an instruction.

    Example: `uniworld edit cat.png "make it snow" -o snow.png --seed 1`
    """
    from uniworld import cli_draw

    cli_draw.edit(images, prompt, output or cli_draw.free_name("edited"), load, drawing, report)


@app.command()
@with_options(load=LoadOptions, drawing=DrawOptions, report=ReportOptions)
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")],
    output: OutputFile = None,
    *,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    """Draw a picture from text.

    Example: `uniworld generate "a lighthouse at dawn" --size 1024x768 -o lighthouse.png`
    """
    from uniworld import cli_draw

    cli_draw.generate(prompt, output or cli_draw.free_name("generated"), load, drawing, report)


@app.command()
@with_options(load=LoadOptions, drawing=DrawOptions, report=ReportOptions)
def perceive(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to look at.")],
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK", help="canny, depth, hed, mlsd, normal, pose, sketch, segment or detect.", show_default=False
        ),
    ],
    target: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to segment or detect; default: everything.")
    ] = None,
    output: OutputFile = None,
    *,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    """Draw what is in a picture: its edges, depth, normals, poses, segments or objects.

    Example: `uniworld perceive street.jpg depth -o depth.png`
    """
    from uniworld import cli_draw

    cli_draw.perceive(image, task, target, output or cli_draw.free_name(task), load, drawing, report)


@app.command()
@with_options(load=LoadOptions, drawing=DrawOptions, report=ReportOptions)
def chat(
    message: Annotated[
        str | None,
        typer.Argument(metavar="[MESSAGE]", help="One message, answered once; without it a conversation starts."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", metavar="FILE", help="Show a picture; may be repeated.")
    ] = None,
    mode: Annotated[
        ChatMode, typer.Option(help="Answer with a picture, with text, or as the model decides.")
    ] = ChatMode.auto,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest word.")] = 0.0,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Where pictures are saved.", rich_help_panel=OUTPUT_PANEL),
    ] = Path("uniworld-chat"),
    *,
    load: LoadOptions,
    drawing: DrawOptions,
    report: ReportOptions,
) -> None:
    """Talk about pictures and have them drawn; the conversation is remembered.

    Example: `uniworld chat --image cat.png`, then type `what is this?` and `give it a hat`

    Example: `uniworld chat "what is this?" --image cat.png --mode text`
    """
    from uniworld import cli_chat

    text = cli_chat.TextOptions(mode=mode.value, max_new_tokens=max_new_tokens, temperature=temperature)
    cli_chat.chat(message, image or [], output, text, load, drawing, report)


@app.command()
def convert(
    qwen: Annotated[str, typer.Argument(metavar="QWEN", help="Qwen2.5-VL folder or Hub id.")],
    flux: Annotated[str, typer.Argument(metavar="FLUX", help="FLUX.1-dev folder or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint folder to make.")],
    siglip: Annotated[
        str | None,
        typer.Option(metavar="DIR|HUB-ID", help="SigLIP2 whose width the connector takes; default: so400m's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the connectors' first weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder where it exists.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the seconds it took.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make the checkpoint that training starts from: Qwen2.5-VL, FLUX and fresh connectors.

    Example: `uniworld convert Qwen/Qwen2.5-VL-7B-Instruct black-forest-labs/FLUX.1-dev -o start`
    """
    from uniworld import cli_draw

    report = ReportOptions(verbose=verbose, quiet=quiet)
    cli_draw.convert(qwen, flux, output, siglip=siglip, seed=seed, overwrite=overwrite, report=report)


@app.command("check-data")
def check_data(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="`data.txt`, tar shards, parquet files, a folder, or the YAML file of a training."
        ),
    ],
    kind: Annotated[str, typer.Option(help="auto, authors, webdataset or parquet.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="A table's own name of a column; may be repeated."),
    ] = None,
    anchor_px: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Area of the targets; default 262144.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Look at N samples of each source, evenly spaced.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with some samples and their masks.")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, metavar="N", help="Samples of each source on the page.")] = 6,
    workers: Annotated[int | None, typer.Option(min=0, metavar="N", help="Processes; default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Check training data: annotations, pictures, sizes and masks. Exits with 1 where samples cannot be used.

    Example: `uniworld check-data data.txt --page data.html`

    Example: `uniworld check-data "shard-{000..031}.tar" --limit 1000`
    """
    from uniworld import cli_check_data

    options = cli_check_data.CheckOptions(
        kind=kind, columns=tuple(column or ()), anchor_px=anchor_px, limit=limit, page=page, num_shown=shown
    )
    return cli_check_data.check_data(sources, options, workers, quiet)


app.command("make-data")(make_data)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see `configs/`.")],
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Train, or go on with a run that stopped; alone, under `torchrun` or under the `deepspeed` launcher.

    A run is stopped by SIGTERM or SIGUSR1: it saves, and the same command goes on.

    Example: `uniworld train configs/tiny_stage1.yaml optim.lr=1e-4`

    Example: `torchrun --nproc-per-node 8 -m uniworld.cli train configs/stage1_512.yaml`
    """
    from uniworld import cli_train

    return cli_train.train(config, overrides or [], quiet)


@app.command()
def precompute(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file that training will use.")],
    overrides: Overrides = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The cache folder to fill.")],
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples a file; default 128.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Run the frozen encoders once over the data, so that training needs none of them.

    The same command goes on where it was interrupted. Under `torchrun` every process takes its share.

    Example: `uniworld precompute configs/stage1_512.yaml -o states`, then `uniworld train configs/stage1_512.yaml
    data.precomputed=states`
    """
    from uniworld import cli_precompute

    cli_precompute.precompute(config, output, overrides or [], samples_per_shard, quiet)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see `configs/`.")],
    overrides: Overrides = None,
    *,
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="GPUs in all.")] = 1,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", min=1, metavar="GIB", help="Of each GPU.")] = 80,
    table: Annotated[
        bool, typer.Option("--table", help="GiB for every ZeRO stage and 1 to 64 GPUs, as Markdown.")
    ] = False,
) -> int:
    """Estimate the memory of a training on each GPU, by part, and recommend settings that fit.

    Exit code 1: it does not fit.

    Example: `uniworld plan configs/stage2_512.yaml --gpus 8 --gpu-memory 80`
    """
    from uniworld import cli_plan

    return cli_plan.plan(config, overrides or [], gpus, gpu_memory, table)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are drawn together.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: curves.png in the first folder."),
    ] = None,
) -> None:
    """Draw loss, learning rate, gradient norm and throughput of runs.

    Example: `uniworld plot runs/stage1 runs/stage1_prodigy`
    """
    from uniworld import cli_plot

    cli_plot.plot(runs, output)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint's folder, or a run's for its newest one.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model folder to make.")],
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights instead of the last ones.")] = False,
    connectors_only: Annotated[
        bool, typer.Option("--connectors-only", help="No model, only the connectors that were trained.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder where it exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a model of a training checkpoint: the base's weights with the trained ones in place.

    Example: `uniworld export runs/stage1 -o my-model --ema`
    """
    from uniworld import cli_export

    cli_export.export(checkpoint, output, ema=ema, connectors_only=connectors_only, overwrite=overwrite, quiet=quiet)


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="The same as JSON, for bug reports.")] = False,
) -> None:
    """Show versions, device, what was built, and which backend each op and the attention will use, and why.

    Example: `uniworld env --json > env.json`
    """
    from uniworld import environment

    environment.show(as_json=json)


def main() -> None:
    """Entry point. Mistakes of the user end in one line on stderr and exit code 2, Ctrl-C in exit code 130."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our stdout left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_CANCELLED
    except Exception as error:
        if os.environ.get("UNIWORLD_DEBUG") == "1":
            raise
        code = _complain(error)
    if code == EXIT_CANCELLED:
        print("cancelled", file=sys.stderr)
    _leave(code if isinstance(code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Exit, in a way that processes of one training survive."""
    sharding = sys.modules.get("uniworld.train.sharding")
    if sharding is not None and sharding.dist.is_initialized():
        sharding.exit_process(code)
    sys.exit(code)


def _complain(error: Exception) -> int:
    """Print one line about `error`; the exit code is 2 for what the user can mend, 1 for our own bugs."""
    usage = getattr(error, "format_message", None)  # the exceptions of typer's option parser
    if usage is not None:
        # Which of several arguments is missing, the parser can only guess: show all of them.
        shown = f" {error.ctx.get_usage()}" if "Missing argument" in usage() and error.ctx else ""
        print(f"error: {_one_line(usage() + shown)}", file=sys.stderr)
        return EXIT_USER_ERROR
    if isinstance(error, ValueError | OSError):
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    if type(error).__name__ == "OutOfMemoryError":
        hint = "try a smaller --size, --vae-tiling or --no-t5"
        if "uniworld.train.trainer" in sys.modules:
            hint = "try sharding.checkpoint_blocks=[double,single], data.precomputed or sharding.zero_stage=3"
        print(f"error: out of GPU memory ({_one_line(str(error))[:120]}); {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    where = "set UNIWORLD_DEBUG=1 to see where"
    print(f"error: {type(error).__name__}: {_one_line(str(error))} ({where})", file=sys.stderr)
    return EXIT_BUG


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
