"""Writes the tables of docs/performance.md, and that of README.md, from the rows in bench/results.

    python bench/tables.py          rewrite the tables
    python bench/tables.py --check  exit 1 where they do not agree with the rows

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else on the page is written by hand.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import summary
import targets
from rows import read, select

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
MARKS = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured.\n"
Row = dict[str, Any]


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def times(ours: Row | None, peer: Row | None) -> str:
    """How many times as long as ours the peer takes, by medians."""
    return f"{peer['median_s'] / ours['median_s']:.2f}x" if ours and peer else "-"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return NOT_MEASURED
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def number(row: Row | None, field: str, form: str = "{:.3g}") -> str:
    return form.format(row[field]) if row and row.get(field) is not None else "-"


def side_of(rows: list[Row], name: str) -> Row | None:
    found = select(rows, side=name)
    return found[-1] if found else None


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one case and dtype together, in the order measured."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row["device"], row["case"], row["dtype"]), []).append(row)
    return list(found.values())


def of_ceiling(row: Row) -> str:
    """The share of what the device does at best, and of what: copying or a matrix product."""
    return f"{row['of_ceiling']:.2f} of {row['ceiling']}" if "of_ceiling" in row else "-"


def ops_table(rows: list[Row]) -> str:
    header = ("op and case", "dtype", "backend", "ours, ms", "torch eager", "torch.compile", "other", "GB/s", "TFLOP/s")
    header = (*header, "of ceiling", "error, ours", "error, torch")
    lines = []
    for row in rows:
        if row["case"].startswith("ceiling, "):
            cells = (row["case"], row["dtype"], "torch", milliseconds(row["median_s"]), *"---")
            lines.append((*cells, number(row, "gb_s"), number(row, "tflop_s"), *"---"))
    for group in groups(rows):
        ours, eager, compiled = (side_of(group, name) for name in ("ours", "torch eager", "torch.compile"))
        known = ("ours", "torch eager", "torch.compile")
        others = [f"{r['side']}: {times(ours, r)}" for r in group if r["side"] not in known]
        if ours is None:
            continue
        lines.append(
            (ours["case"], ours["dtype"], ours["backend"], milliseconds(ours["median_s"]), times(ours, eager))
            + (times(ours, compiled), ", ".join(others) or "-", number(ours, "gb_s"), number(ours, "tflop_s"))
            + (of_ceiling(ours), number(ours, "error", "{:.1e}"), number(eager, "error", "{:.1e}"))
        )
    return table(header, lines)


def timing_cells(row: Row) -> tuple[str, str, str, str]:
    """Case and dtype, side, median and best in seconds."""
    return f"{row['case']}, {row['dtype']}", row["side"], f"{row['median_s']:.3f}", f"{row['min_s']:.3f}"


def dit_step_table(rows: list[Row]) -> str:
    header = ("model, dtype and device", "side", "median, s", "best, s", "of diffusers' median", "TFLOP/s", "error")
    lines = []
    for row in rows:
        case, *timing = timing_cells(row)
        device = row["device"].split(",")[0]
        figures = number(row, "time_of_diffusers", "{:.2f}"), number(row, "tflop_s"), number(row, "error", "{:.1e}")
        lines.append((f"{case}, {device}", *timing, *figures))
    return table(header, lines)


def generate_table(rows: list[Row]) -> str:
    header = (
        "request",
        "side",
        "median, s",
        "best, s",
        "of diffusers' median",
        "error",
        "condition, denoise, decode, s",
    )
    lines = []
    for row in rows:
        rooms = row.get("rooms_s", {})
        parts = ", ".join(f"{rooms[name]:.2f}" for name in ("condition", "denoise", "decode") if name in rooms)
        lines.append(
            timing_cells(row)
            + (number(row, "time_of_diffusers", "{:.2f}"), number(row, "error", "{:.1e}"), parts or "-")
        )
    return table(header, lines)


def overhead_table(rows: list[Row]) -> str:
    """A request's time outside of its models, and the pieces of it that are known."""
    header = ("request", "median, ms", "best, ms", "of it words and VLM's pictures", "SigLIP's pictures", "connectors")
    lines = [
        (row["case"], milliseconds(row["median_s"]), milliseconds(row["min_s"]))
        + tuple(
            milliseconds(row["outside_s"][part]) if part in row["outside_s"] else "-"
            for part in ("tokenize", "preprocess", "connectors")
        )
        for row in rows
    ]
    return table(header, lines)


def region_mask_table(rows: list[Row]) -> str:
    header = ("pair", "side", "median, ms", "best, ms", "times faster, by the best")
    lines = [
        (
            row["case"],
            row["side"],
            milliseconds(row["median_s"]),
            milliseconds(row["min_s"]),
            number(row, "times_faster", "{:.1f}"),
        )
        for row in rows
    ]
    return table(header, lines)


def full_scale_table(rows: list[Row]) -> str:
    """Steps and requests; a side that was not measured says why."""
    header = ("case", "side", "median, ms", "samples", "TFLOP/s", "of the GEMM rate", "peak, GiB", "attention")
    header = (*header, "steps saved", "error")
    lines = []
    for row in rows:
        if "missing" in row:
            lines.append((row["case"], row["side"], row["missing"], *("-" for _ in header[3:])))
            continue
        lines.append(
            (
                row["case"],
                row["side"],
                milliseconds(row["median_s"]),
                str(row["samples"]),
                number(row, "tflop_s"),
                number(row, "of_gemm", "{:.2f}"),
                number(row, "peak_gib", "{:.1f}"),
                row.get("attention", "-"),
                f"{row['saved_steps']} of {row['steps']}" if "saved_steps" in row else "-",
                number(row, "error", "{:.1e}"),
            )
        )
    return table(header, lines)


def throughput_table(rows: list[Row]) -> str:
    """Steps of single samples a second against the batch, of the cases that were measured in batches."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if "samples_per_s" in row:
            case = row["case"].removesuffix(f", batch {row['batch']}")
            found.setdefault((case, row["side"]), {})[row["batch"]] = row
    batches = sorted({batch for by_batch in found.values() for batch in by_batch})
    lines = [
        (case, side, *(number(by_batch.get(batch), "samples_per_s") for batch in batches))
        for (case, side), by_batch in found.items()
        if len(by_batch) > 1
    ]
    return table(("case", "side", *(f"batch {batch}" for batch in batches)), lines)


def train_step_table(rows: list[Row]) -> str:
    """Each side against the plain one, or, where its averages of all parameters do not fit, that without them."""
    header = ("stage and dtype", "side", "median, s", "best, s", "images/s", "times faster than plain", "peak, GiB")
    header = (*header, "gradient's error")
    lines = []
    for row in rows:
        faster = number(row, "times_faster", "{:.2f}")
        if row.get("times_faster_than", "plain") != "plain":
            faster += " (EMA of the trained alone)"
        gradient = number(row, "gradient_error", "{:.1e}")
        lines.append(
            (*timing_cells(row), number(row, "images_per_s"), faster, number(row, "peak_gib", "{:.1f}"), gradient)
        )
    return table(header, lines)


def ema_table(rows: list[Row]) -> str:
    header = ("size and source", "side", "median, ms", "best, ms", "GB/s", "of copying", "times faster than foreach")
    lines = [
        (f"{row['case']}, {row['dtype']}", row["side"], milliseconds(row["median_s"]), milliseconds(row["min_s"]))
        + (number(row, "gb_s"), number(row, "of_ceiling", "{:.2f}"), number(row, "times_faster", "{:.2f}"))
        for row in rows
    ]
    return table(header, lines)


def alone_table(rows: list[Row]) -> str:
    """How much longer a step takes without one optimization: below 1 it gave nothing."""
    header = ("step", "taken away", "median, ms", "best, ms", "times as long as with all", "error")
    with_all = {row["case"]: row for row in rows if row["side"] == "all of them"}
    lines = [
        (row["case"], "nothing" if row is with_all.get(row["case"]) else row["side"], milliseconds(row["median_s"]))
        + (milliseconds(row["min_s"]), number(row, "times_longer", "{:.3f}"), number(row, "error", "{:.1e}"))
        for row in rows
    ]
    return table(header, lines)


def tiny_table(rows: list[Row]) -> str:
    header = ("what", "median, s", "best, s", "samples", "pairs/s")
    lines = [
        (row["case"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}", str(row["samples"]), number(row, "pairs_per_s"))
        for row in rows
    ]
    return table(header, lines)


def decode_table(rows: list[Row]) -> str:
    header = ("decoding, dtype", "side", "median, s", "best, s", "times as long as torch's layout", "error")
    lines = [
        (*timing_cells(row), number(row, "times_longer", "{:.2f}"), number(row, "error", "{:.1e}")) for row in rows
    ]
    return table(header, lines)


def load_table(rows: list[Row]) -> str:
    header = ("weights, dtype", "side", "median, s", "best, s", "GB/s", "times as long as ours")
    lines = [
        (*timing_cells(row), number(row, "gb_per_s", "{:.2f}"), number(row, "times_longer", "{:.2f}")) for row in rows
    ]
    return table(header, lines)


def cold_start_table(rows: list[Row]) -> str:
    header = ("case, dtype", "side", "median, s", "best, s", "importing, s", "loading, s", "drawing, s")
    lines = [
        (*timing_cells(row), *(f"{row['parts_s'][part]:.3f}" for part in ("import", "load", "draw"))) for row in rows
    ]
    return table(header, lines)


def counts_step_table(rows: list[Row]) -> str:
    header = ("step", "side", "kernels", "of diffusers'", "TFLOPs", "of F(S)", "GB read and written")
    lines = [
        (row["case"], row["side"], str(row["kernels"]), number(row, "kernels_of_diffusers", "{:.2f}"))
        + (f"{row['flops'] / 1e12:.3f}", number(row, "flops_of_formula", "{:.4f}"), f"{row['bytes'] / 1e9:.1f}")
        for row in rows
    ]
    return table(header, lines)


def counts_ops_table(rows: list[Row]) -> str:
    header = ("op and case", "floor, MB", "ours, MB", "of the floor", "kernels")
    header = (*header, "torch eager, MB", "of the floor", "kernels")
    lines = []
    for group in groups(rows):
        ours, eager = side_of(group, "ours"), side_of(group, "torch eager")
        cells = [ours["case"], f"{ours['floor_bytes'] / 1e6:.2f}"]
        for row in (ours, eager):
            moved = f"{row['bytes'] / 1e6:.2f}" if row else "-"
            cells += [moved, number(row, "of_floor", "{:.3f}"), number(row, "kernels", "{}")]
        lines.append(tuple(cells))
    return table(header, lines)


def sources_table(rows: list[Row]) -> str:
    """Where the rows of one kind of device come from: one line a bench and commit."""
    header = ("bench", "device", "commit", "date", "versions")
    lines = {}
    for row in rows:
        threads = f", {row['threads']} threads" if "threads" in row else ""
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        line = (row["bench"], row["device"] + threads, row["commit"], row["date"][:10], versions)
        lines.setdefault(line, line)
    return table(header, list(lines.values()))


# The name after "table:" is a bench, or another view of its rows, and a kind of device.
ROWS_OF = {"throughput": "full_scale"}
TABLES: dict[str, Callable[[list[Row]], str]] = {
    "ops": ops_table,
    "dit_step": dit_step_table,
    "generate": generate_table,
    "overhead": overhead_table,
    "train_step": train_step_table,
    "ema": ema_table,
    "region_mask": region_mask_table,
    "full_scale": full_scale_table,
    "throughput": throughput_table,
    "alone": alone_table,
    "decode": decode_table,
    "load": load_table,
    "cold_start": cold_start_table,
    "tiny": tiny_table,
    "counts_step": counts_step_table,
    "counts_ops": counts_ops_table,
}


def render(page: str, rows: list[Row]) -> str:
    """The page with every table made anew from `rows`."""

    def one(match: re.Match) -> str:
        if match[2] == "summary":
            return f"{match[1]}\n{table(summary.HEADER, list(summary.lines(rows)))}\n{match[3]}"
        if match[2] == "targets":
            return f"{match[1]}\n{table(targets.HEADER, targets.lines(rows))}\n{match[3]}"
        bench, kind = match[2].split()
        of_kind = select(rows, kind=kind)
        rows_of = select(of_kind, bench=ROWS_OF.get(bench, bench))
        body = sources_table(of_kind) if bench == "sources" else TABLES[bench](rows_of)
        return f"{match[1]}\n{body}\n{match[3]}"

    return MARKS.sub(one, page)


def update(rendered: Callable[[str], str], script: str, *paths: Path) -> None:
    """What a script that writes pages does: put `rendered` of each in its place, or with --check only compare."""
    parser = argparse.ArgumentParser(description=f"Writes the tables of {', '.join(path.name for path in paths)}.")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where a page is out of date")
    args = parser.parse_args()
    for path in paths:
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if args.check and before != after:
            sys.exit(f"{path}: is out of date; run python bench/{script}")
        if before != after:
            path.write_text(after, encoding="utf-8")


def main() -> None:
    update(lambda page: render(page, read()), "tables.py", PAGE, README)


if __name__ == "__main__":
    main()
