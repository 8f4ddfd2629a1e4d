"""The targets for an H200, held against the rows: each is met, missed, or not measured.

Where a target speaks of several cases, the one that is furthest from it counts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rows import select

Row = dict[str, Any]
HEADER = ("target on an H200", "wanted", "measured", "verdict")
DEVICE = "H200"  # in the name of the device
BF16, FP8 = ("ours", "ours, CUDA graph", "ours compiled"), ("ours, fp8", "ours, fp8, CUDA graph")
EAGER, COMPILED = "diffusers eager", "diffusers compiled"
STAGE2_GIB = 80e9 / 2**30
# Ops whose every value is computed from its own place alone, or from its row.
ELEMENTWISE = ("adaln_modulate", "gate_residual", "qk_norm_rope", "quantize_rows", "flow_noise", "flow_step")
SINGLE = "step, "  # cases of one step
SLOWER_START = "ours, encoding after loading"  # what the engine's own way is held against


@dataclass(frozen=True)
class Target:
    """values: of rows of an H200, what is compared with `bound`, one a case, each with what it is of."""

    what: str
    bound: float
    at_least: bool
    form: str
    values: Callable[[list[Row]], Iterable[tuple[float, str]]]

    def cells(self, rows: list[Row]) -> tuple[str, str, str, str]:
        wanted = f"{'at least' if self.at_least else 'under'} {self.form.format(self.bound)}"
        found = list(self.values(rows))
        if not found:
            return self.what, wanted, "-", "not measured"
        value, case = (min if self.at_least else max)(found)
        met = value >= self.bound if self.at_least else value < self.bound
        return self.what, wanted, f"{self.form.format(value)} ({case})", "met" if met else "missed"


def lines(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    """Cells of `HEADER`, a line a target."""
    measured = [row for row in rows if row["kind"] == "cuda" and DEVICE in row["device"] and "median_s" in row]
    return [target.cells(measured) for target in TARGETS]


def _cases(rows: list[Row], start: str = SINGLE) -> Iterator[tuple[str, dict[str, Row]]]:
    """Rows of full-scale cases of one sample at a time, by side."""
    found: dict[str, dict[str, Row]] = {}
    for row in select(rows, bench="full_scale"):
        if row["case"].startswith(start) and row.get("batch", 1) == 1:
            found.setdefault(row["case"], {})[row["side"]] = row
    yield from found.items()


def _fastest(sides: dict[str, Row], names: Iterable[str]) -> Row | None:
    return min((sides[name] for name in names if name in sides), key=lambda row: row["median_s"], default=None)


def _faster(ours: Iterable[str], theirs: Iterable[str]) -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    """How many times as long the other side takes for a step."""

    def values(rows: list[Row]) -> Iterator[tuple[float, str]]:
        for case, sides in _cases(rows):
            one, other = _fastest(sides, ours), _fastest(sides, theirs)
            if one and other:
                yield other["median_s"] / one["median_s"], case

    return values


def _of_gemm(rows: list[Row]) -> Iterator[tuple[float, str]]:
    for case, sides in _cases(rows):
        if "1024 px" in case and (one := _fastest(sides, BF16)) and "of_gemm" in one:
            yield one["of_gemm"], case


def _of_copying(rows: list[Row]) -> Iterator[tuple[float, str]]:
    for row in rows:
        elementwise = row["bench"] == "ops" and row["case"].startswith(ELEMENTWISE) and row.get("ceiling") == "copy"
        if row["side"] == "ours" and "of_ceiling" in row and (elementwise or row["bench"] == "ema"):
            yield row["of_ceiling"], f"{row['case']}, {row['dtype']}"


def _seconds(start: str, scale: float = 1.0, without: str = "") -> Callable[[list[Row]], Iterator[tuple[float, str]]]:
    def values(rows: list[Row]) -> Iterator[tuple[float, str]]:
        for case, sides in _cases(rows, start):
            for side, row in sides.items():
                if side != without:
                    yield row["median_s"] * scale, f"{case}, {side}"

    return values


def _training(rows: list[Row]) -> Iterator[tuple[float, str]]:
    for row in select(rows, bench="train_step", side="ours"):
        if "times_faster" in row:
            yield row["times_faster"], row["case"]


def _stage2_memory(rows: list[Row]) -> Iterator[tuple[float, str]]:
    for row in select(rows, bench="train_step"):
        if row["case"].startswith("stage2") and row["case"].endswith("all blocks") and "peak_gib" in row:
            yield row["peak_gib"], row["case"]


TARGETS = (
    Target("bf16 step against diffusers eager", 1.6, True, "{:.2f}x", _faster(BF16, (EAGER,))),
    Target("bf16 step against diffusers compiled", 1.05, True, "{:.2f}x", _faster(BF16, (COMPILED,))),
    Target("F(S) at 1024 px, of the GEMM rate", 0.75, True, "{:.2f}", _of_gemm),
    Target("fp8 step against our bf16", 1.35, True, "{:.2f}x", _faster(FP8, BF16)),
    Target("elementwise ops and EMA, of copying", 0.85, True, "{:.2f}", _of_copying),
    Target("a request outside of its models", 5.0, False, "{:.1f} ms", _seconds("request outside", 1e3)),
    Target("cold start to the first picture", 30.0, False, "{:.1f} s", _seconds("cold start", without=SLOWER_START)),
    Target("training steps against the plain ones", 1.5, True, "{:.2f}x", _training),
    Target("stage 2 at full depth on one GPU of 80 GB", STAGE2_GIB, False, "{:.1f} GiB", _stage2_memory),
)
