"""The few rows that README.md shows."""

from collections.abc import Iterator
from typing import Any

from rows import select

Row = dict[str, Any]
HEADER = ("what", "here", "diffusers", "where")
COUNTED = "edit, 1024 px, S = 5696"
# At full size on a GPU: what, the case, our side that users get.
FULL_SCALE = (
    ("one DiT step of an edit, 1024x1024, full size", "step, edit, 1024 px", "ours, CUDA graph"),
    ("one edit, 1024x1024, 28 steps, full size", "request, edit, 1024 px", "ours"),
)
NOT_MEASURED = ("not measured", "not measured", "an H200")


def lines(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Cells of `HEADER`, of each measurement the last rows."""
    for ours in select(rows, bench="dit_step", kind="cpu", side="ours"):
        yield f"one DiT step, {ours['case']}, {ours['dtype']}", *seconds(rows, ours)
    for ours in select(rows, bench="counts_step", case=COUNTED, side="ours"):
        peer = _peer(rows, ours)
        what = "kernels that one DiT step launches, full size, counted"
        yield what, str(ours["kernels"]), str(peer["kernels"]), f"any machine, {ours['date'][:10]}"
    for what, case, side in FULL_SCALE:
        found = select(rows, bench="full_scale", kind="cuda", case=case, side=side)
        yield what, *(seconds(rows, found[-1]) if found and "median_s" in found[-1] else NOT_MEASURED)


def seconds(rows: list[Row], ours: Row) -> tuple[str, str, str]:
    """Medians of both sides, and where they were measured."""
    peer = _peer(rows, ours)
    here, theirs = (f"{row['median_s']:.3f} s" if row and "median_s" in row else "-" for row in (ours, peer))
    return here, theirs, f"{ours['device']}, {ours['date'][:10]}"


def _peer(rows: list[Row], ours: Row) -> Row | None:
    same = {name: ours[name] for name in ("bench", "case", "dtype", "device")}
    found = select(rows, side="diffusers eager", **same)
    return found[-1] if found else None
