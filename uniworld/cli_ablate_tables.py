"""The tables that `ablate` prints: what there is to ask, and what came of it."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uniworld.train.ablations import ABLATIONS, Ablation

# Of a result's figures, their titles and units.
FIGURES = {
    "t2i": ("t2i", "%"),
    "edit": ("edit", "%"),
    "changed": ("changed", "%"),
    "stayed": ("stayed", "%"),
    "psnr_db": ("out dB", "dB"),
    "inside_db": ("in dB", "dB"),
    "perceive": ("maps", "%"),
}


def print_list() -> None:
    """Names, questions, and variants with what `--only` calls them."""
    table = Table("name", "question", "variants", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for name, ablation in ABLATIONS.items():
        variants = "; ".join(f"{variant.title} ({variant.name})" for variant in ablation.variants)
        table.add_row(name, ablation.question, variants)
    Console(highlight=False).print(table)


def print_result(ablation: Ablation, found: Sequence[dict[str, Any]]) -> None:
    """The tables on stdout."""
    console = Console(highlight=False)
    console.print(f"{ablation.question}\nIn percent, and decibels outside and inside of the mask:")
    console.print(figures_table(found))
    if ablation.by_region:
        console.print("Edits that succeed, and decibels inside, by the share of the picture that they change:")
        console.print(regions_table(found))


def figures_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table("", *(title for title, _ in FIGURES.values()), box=box.SIMPLE_HEAD, pad_edge=False)
    for variant in found:
        table.add_row(variant["title"], *(told(variant["figures"][key], unit) for key, (_, unit) in FIGURES.items()))
    return _right_aligned(table)


def regions_table(found: Sequence[dict[str, Any]]) -> Table:
    titles = [f"{region['low']:.0%} to {region['high']:.0%} ({region['num']})" for region in found[0]["regions"]]
    table = Table("", *titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for variant in found:
        table.add_row(variant["title"], *map(region_told, variant["regions"]))
    return _right_aligned(table)


def region_told(region: dict[str, Any]) -> str:
    """Success and PSNR of the edits in a region."""
    return f"{told(region['success'], '%')}, {told(region['inside_db'], 'dB')}"


def told(value: float | None, unit: str) -> str:
    """A score as the tables show it; they must fit 80 columns."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if unit == "%" else f"{value:.1f}"


def _right_aligned(table: Table) -> Table:
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    return table
