"""The commands below `eval`, which score a model. What does the work is imported inside them."""

from pathlib import Path
from typing import Annotated

import typer

from uniworld.cli_options import LoadOptions, ReportOptions, with_options

eval_app = typer.Typer(
    help="Score a model by program.\n\nExample: `uniworld eval scenes --model tiny -o scores`",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@eval_app.command()
@with_options(load=LoadOptions, report=ReportOptions)
def scenes(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For answers and scores; the same one goes on.")
    ] = Path("scores"),
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out items a column.")] = 500,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="understanding, t2i, edit, perceive, routing, or one such as `edit add`; default: all.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: the model's own, or 28.", show_default=False)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="Embedded guidance; default: the model's own, or 3.5.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the items and of the noise.")] = 0,
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Width and height of the pictures.")] = 128,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures drawn at a time.")] = 8,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that score; default: one a core.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with some pictures of each column.")
    ] = None,
    shown: Annotated[int, typer.Option(min=0, metavar="N", help="Items of each column on the page.")] = 12,
    *,
    load: LoadOptions,
    report: ReportOptions,
) -> None:
    """Score understanding, generation, editing, perception and routing on held-out drawn scenes.

    The same command goes on where it was interrupted.

    Example: `uniworld eval scenes --model tiny --num 500 -o scores --page scores.html`

    Example: `uniworld eval scenes --columns "t2i,edit add" --num 50 -o quick`
    """
    from uniworld import cli_eval

    options = cli_eval.EvalOptions(
        num=num, columns=columns, steps=steps, guidance=guidance, seed=seed, size_px=size, batch=batch,
        workers=workers, page=page, num_shown=shown,
    )  # fmt: skip
    cli_eval.scenes(output, options, load, report)
