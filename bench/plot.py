"""Draws the rows of bench/results: a PNG for each bench and kind of device, and where the ops stand under their roof.

python bench/plot.py [--rows DIR] [--out DIR]
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import roofline
from rows import RESULTS, read, select

matplotlib.use("Agg")
from matplotlib import pyplot

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = ("#1b6ca8", "#9aa5b1", "#d98e04", "#6a994e", "#8e5572", "#4d4d4d")
BENCHES = ("ops", "dit_step", "generate", "train_step", "ema", "region_mask", "full_scale")


def bars(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Median times relative to ours, a group of bars a case; the label gives ours in milliseconds."""
    cases = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    times = {(row["case"], row["dtype"], row["side"]): row["median_s"] for row in rows}
    height = 0.8 / len(sides)
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + len(cases) * (0.16 * len(sides) + 0.18)), layout="constrained")
    for index, side in enumerate(sides):
        found = [(place, times[*case, side] / times[*case, "ours"]) for place, case in enumerate(cases)
                 if (*case, side) in times and (*case, "ours") in times]  # fmt: skip
        places, ratios = [place + (index - len(sides) / 2 + 0.5) * height for place, _ in found], [r for _, r in found]
        axes.barh(places, ratios, height, label=side, color=COLOURS[index % len(COLOURS)])
    axes.set_yticks(range(len(cases)), [label(case, times) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel("time, ours = 1 (longer is slower)")
    if max(bar.get_width() for bar in axes.patches) > 8:
        axes.set_xscale("log")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def label(case: tuple[str, str], times: dict[tuple[str, str, str], float]) -> str:
    ours = times.get((*case, "ours"))
    return f"{case[0]}\n{case[1]}" + (f", ours {ours * 1e3:.3g} ms" if ours else "")


def compares(row: dict[str, Any]) -> bool:
    """Whether a row is a time of one side among several."""
    return "median_s" in row and not row["case"].startswith("ceiling, ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of rows, bench/results by default")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the PNGs, docs/images by default")
    args = parser.parse_args()
    rows = read(args.rows)
    for device in dict.fromkeys(row["device"] for row in rows):
        for bench in BENCHES:
            found = [row for row in select(rows, bench=bench, device=device) if compares(row)]
            if any(row["side"] == "ours" for row in found):
                path = args.out / f"{bench}_{found[0]['kind']}.png"
                bars(found, f"{bench}, {device}, torch {found[-1]['versions']['torch']}", path)
                print(path)
        of_device = select(rows, device=device)
        if roofline.measured(of_device):
            path = args.out / f"roofline_{of_device[0]['kind']}.png"
            roofline.save(of_device, f"ops on the {of_device[0]['kind'].upper()}, {device}", path)
            print(path)


if __name__ == "__main__":
    main()
