"""The command line. Torch and transformers are imported inside the commands, so that `--help` is immediate."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from uniworld import cli_training
from uniworld.cli_measure import eval_app
from uniworld.cli_options import (
    OUTPUT_PANEL,
    DrawOptions,
    LoadOptions,
    OutputFile,
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
    connectors: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of exported connectors to take; default: fresh ones."),
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
    taken = {"siglip": siglip, "connectors": connectors}
    cli_draw.convert(qwen, flux, output, **taken, seed=seed, overwrite=overwrite, report=report)


for command in cli_training.COMMANDS:
    app.command()(command)
app.add_typer(eval_app, name="eval")


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
    """Exit, in a way that processes of one training, or of one picture, survive."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        from uniworld.train.sharding import exit_process

        exit_process(code)
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
        hint = "try a smaller --size, --vae-tiling, --no-t5, --offload cpu or --quantize fp8"
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
