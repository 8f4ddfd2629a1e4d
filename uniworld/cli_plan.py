"""The command `plan`: the memory of a training on each GPU as a table, and which settings fit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from uniworld.config import TrainConfig, load_config
from uniworld.train.plan import GIB, Plan, changes, estimate, recommend, sizes_of

EXIT_DOES_NOT_FIT = 1
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64)


def plan(path: Path, overrides: Sequence[str], gpus: int, gpu_memory: float, table: bool) -> int:
    """Print the estimate, or with `table` one for every ZeRO stage and number of GPUs; returns the exit code."""
    config = load_config(path, overrides)
    if table:
        print("".join(memory_table(config)), end="")
        return 0
    planned = estimate(config, gpus)
    show(config.stage.preset, planned, gpu_memory)
    return advise(config, planned, gpu_memory)


def show(stage: str, planned: Plan, gpu_memory: float) -> None:
    """What was assumed, and a line for each part."""
    batch = planned.batch
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{stage}, {planned.num_trained:,} of {planned.num_parameters:,} parameters trained, sizes: "
        f"{planned.sizes.source}\n{planned.gpus} x {gpu_memory:g} GiB, ZeRO {planned.sharding.zero_stage}, "
        f"{planned.sharding.dtype}, {batch.batch_size} x {batch.width_px}x{batch.height_px} px a GPU, "
        f"{batch.num_vlm + batch.num_siglip + batch.num_t5} text tokens with one reference picture",
        markup=False,
    )
    table = Table(box=box.SIMPLE)
    table.add_column("on each GPU")
    table.add_column("GiB", justify="right")
    for name, num_bytes in planned.static.items():
        if num_bytes:
            table.add_row(name, gib(num_bytes))
    largest = max(planned.passing, key=lambda name: planned.passing[name])
    for name, num_bytes in planned.passing.items():
        text = gib(num_bytes) if name == largest else f"({gib(num_bytes)})"
        table.add_row(f"for a while: {name}", text, style=None if name == largest else "dim")
    for name, num_bytes in planned.allowance.items():
        table.add_row(f"allowance: {name}", gib(num_bytes))
    table.add_section()
    table.add_row("in all (of the passing ones the largest)", gib(planned.total))
    if planned.host:
        table.add_row("in host memory, for each GPU", gib(planned.host))
    console.print(table)


def advise(config: TrainConfig, planned: Plan, gpu_memory: float) -> int:
    """Whether it fits, else what would; returns the exit code."""
    if planned.total <= gpu_memory * GIB:
        print(f"fits {gpu_memory:g} GiB")
        return 0
    found = recommend(config, planned.gpus, gpu_memory * GIB)
    if found is None:
        print(f"does not fit {gpu_memory:g} GiB with any settings; take more GPUs or a smaller data.anchor_px")
        return EXIT_DOES_NOT_FIT
    better, changed = found
    print(f"does not fit {gpu_memory:g} GiB; {gib(better.total)} GiB with: {' '.join(changes(config, changed))}")
    return EXIT_DOES_NOT_FIT


def memory_table(config: TrainConfig) -> Iterator[str]:
    """GiB on each GPU by ZeRO stage and number of GPUs, as the lines of a Markdown table."""
    sizes = sizes_of(config)
    yield f"| GPUs | {' | '.join(f'ZeRO {stage}' for stage in (1, 2, 3))} |\n|---:|---:|---:|---:|\n"
    for gpus in TABLE_GPUS:
        stages = (replace(config, sharding=replace(config.sharding, zero_stage=stage)) for stage in (1, 2, 3))
        yield f"| {gpus} | {' | '.join(gib(estimate(c, gpus, sizes).total) for c in stages)} |\n"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB else f"{num_bytes / GIB:.2f}"
