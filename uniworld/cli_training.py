"""The commands around training: data, runs, what comes of them. Each imports what it needs when it is called."""

from pathlib import Path
from typing import Annotated

import typer

from uniworld.cli_make_data import make_data
from uniworld.cli_options import Overrides


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


def train_part(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see `configs/tiny/`.")],
    overrides: Overrides = None,
    *,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, metavar="M", help="Stop and save after this time; run again to go on."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Train a part that UniWorld-V1 takes as given, from nothing and on drawn scenes: how `tiny` is made.

    A run that was stopped or killed goes on with the same command; exit code 143 says that it is not finished. At the
    end the part is scored on held-out scenes and written to `RUN_DIR/model`.

    Example: `uniworld train-part configs/tiny/vae.yaml --minutes 60`
    """
    from uniworld import cli_train_part

    return cli_train_part.train_part(config, overrides or [], minutes, quiet)


def train_tiny(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Of all runs.")] = Path("runs/tiny"),
    *,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, metavar="M", help="Stop and save after this time; run again to go on."),
    ] = None,
    configs: Annotated[Path, typer.Option(metavar="DIR", help="One YAML file a training.")] = Path("configs/tiny"),
    finished: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Parts that are not trained again.", show_default=False),
    ] = None,
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Items that stages 1 and 2 learn from.")] = 96_000,
    wider: Annotated[
        int, typer.Option(min=1, metavar="K", help="K times the batch in a K-th of the steps; 8 suits a large GPU.")
    ] = 1,
    show_steps: Annotated[bool, typer.Option("--steps", help="List the steps and which are done; run none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing of the steps.")] = False,
) -> int:
    """Train the model `tiny` from nothing: its parts, then stage 1 and stage 2, each by a command that is shown.

    Steps that are done are not done again. Exit code 143 says that time or a signal ended it before the last one.

    Example: `uniworld train-tiny -o runs/tiny --minutes 120`
    """
    from uniworld import cli_train_tiny

    return cli_train_tiny.train_tiny(output, configs, finished, num, wider, minutes, show_steps, quiet)


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


def ablate(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which question; see --list. Or all.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    *,
    listed: Annotated[bool, typer.Option("--list", help="Show the names, what they ask and compare.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For runs and scores; the same one goes on.")
    ] = Path("runs/ablations"),
    start: Annotated[
        str, typer.Option(metavar="tiny|DIR", help="The model that all variants start from, flux/ and siglip/ in it.")
    ] = "tiny",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Of `make-data`, or a source as `train` takes; default: drawn.", show_default=False
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, metavar="N", help="Optimizer steps of each variant in all.")] = 2000,
    num: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out items a column.")] = 100,
    columns: Annotated[str, typer.Option(metavar="NAME,...", help="As of `eval scenes`.")] = "t2i,edit,perceive",
    only: Annotated[
        str | None, typer.Option(metavar="RUN,...", help="Of the variants these; --list.", show_default=False)
    ] = None,
    draw_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Denoising steps of a picture; default: its own.", show_default=False),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, help="FLUX guidance scale of a picture; default: its own.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of training and its data; the held-out items stay the same.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that draw data and score; default: one a core.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> int:
    """Answer one of the paper's questions on the small world: variants of the model, trained with one budget each.

    The same command goes on where it was interrupted, and ablations in one folder share the runs that they have in
    common. KEY=VALUE are settings of all trainings.

    Example: `uniworld ablate --list`

    Example: `uniworld ablate region --steps 2000 --num 100 -o runs/ablations`
    """
    if listed:
        from uniworld.cli_ablate_tables import print_list

        print_list()
        return 0
    if name is None:
        raise ValueError("NAME: is missing; --list shows the ablations there are")

    from uniworld import cli_ablate

    options = cli_ablate.AblateOptions(
        start=start, data=data, steps=steps, num=num, columns=columns, only=only, draw_steps=draw_steps,
        guidance=guidance, seed=seed, workers=workers, overrides=tuple(overrides or ()), quiet=quiet,
    )  # fmt: skip
    return cli_ablate.ablate(name, output, options)


COMMANDS = (check_data, make_data, train, train_part, train_tiny, precompute, plan, plot, export, ablate)
