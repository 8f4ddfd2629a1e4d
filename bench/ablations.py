"""Writes the tables of docs/ablations.md from the results in bench/results/ablations.

    python bench/ablations.py          rewrite the tables
    python bench/ablations.py --check  exit 1 where they do not agree with the results

A result is the `DIR/NAME.json` of `uniworld ablate NAME -o DIR`, under any name. Results of one ablation follow each
other by date. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import MARKS, table, update

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ablations.md"
RESULTS = Path(__file__).resolve().parent / "results" / "ablations"
NOT_RUN = "Not run yet.\n"
FIGURES = {"t2i": "text to image", "edit": "editing", "changed": "changed", "stayed": "stayed"}
FIGURES |= {"psnr_db": "outside, dB", "inside_db": "inside, dB", "perceive": "perception"}
BY_REGION = "region"  # the ablation that is told by the size of the edited region
Result = dict[str, Any]


def read_results(folder: Path = RESULTS) -> list[Result]:
    """All results, by date."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: result["date"])


def score(value: float | None, field: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if field.endswith("_db") else f"{100 * value:.1f} %"


def told(result: Result) -> str:
    """One result: how it was made, and its tables."""
    steps, size = result["steps"], result["batch_size"]
    budget = f"{steps:,} steps of {size} samples a variant, {result['num']} held-out items a column"
    machine = f"{result['device']}, {result['dtype']}, {result['date'][:10]}, version {result['versions']['uniworld']}"
    random = " The start has random weights: this is noise." if result["random_start"] else ""
    head = f"Budget: {budget}. Seed {result['seed']}. {machine}.{random}\n\n```bash\n{result['command']}\n```\n"
    lines = [
        (variant["title"], *(score(variant["figures"][field], field) for field in FIGURES))
        for variant in result["variants"]
    ]
    parts = [head, table(("variant", *FIGURES.values()), lines)]
    if result["ablation"] == BY_REGION:
        parts.append(regions_table(result["variants"]))
    return "\n".join(parts)


def regions_table(variants: Sequence[dict[str, Any]]) -> str:
    """Success of edits by the share of the picture that they change."""
    regions = variants[0]["regions"]
    header = [f"{region['low']:.0%} to {region['high']:.0%} ({region['num']} edits)" for region in regions]
    lines = [
        (v["title"], *(f"{score(r['success'])}, {score(r['inside_db'], 'inside_db')} dB" for r in v["regions"]))
        for v in variants
    ]
    return table(("edits that succeed, and inside, by edited share", *header), lines)


def render(page: str, results: Sequence[Result]) -> str:
    """The page with every table made anew."""

    def one(match: re.Match) -> str:
        own = "\n".join(told(result) for result in results if result["ablation"] == match[2])
        return f"{match[1]}\n{own or NOT_RUN}\n{match[3]}"

    return MARKS.sub(one, page)


if __name__ == "__main__":
    update(lambda page: render(page, read_results()), "ablations.py", PAGE)
