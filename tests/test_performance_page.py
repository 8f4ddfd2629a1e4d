"""The tables of docs/performance.md and README.md are those of the rows in bench/results."""

import re
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import rows
    import tables

    return rows, tables


def test_tables_agree_with_rows(bench):
    rows, tables = bench
    for path in (tables.PAGE, tables.README):
        page = path.read_text(encoding="utf-8")
        assert "<!-- table: " in page and tables.render(page, rows.read()) == page, "run python bench/tables.py"


def test_the_summary_takes_full_scale_rows(bench):
    """Of each case our side and diffusers' eager one; a side that was not measured stays out."""
    import summary

    one = {"dtype": "bfloat16", "device": "card", "kind": "cuda", "bench": "full_scale", "date": "2026-01-02T03"}
    case = {"case": "step, edit, 1024 px", **one}
    rows = [{"side": side, "median_s": s, **case} for side, s in (("ours, CUDA graph", 0.25), ("diffusers eager", 0.5))]
    rows.append({"case": "request, edit, 1024 px", "side": "ours", "missing": "no time", **one})
    found = {what: others for what, *others in summary.lines(rows)}
    assert found["one DiT step of an edit, 1024x1024, full size"] == ["0.250 s", "0.500 s", "card, 2026-01-02"]
    assert found["one edit, 1024x1024, 28 steps, full size"] == list(summary.NOT_MEASURED)


def test_tables_without_rows_say_so(bench):
    _, tables = bench
    page = tables.PAGE.read_text(encoding="utf-8")
    empty = tables.render(page, [])
    assert empty.count(tables.NOT_MEASURED) == page.count("<!-- table: ") - page.count("<!-- table: targets -->") > 0
    assert "| ours |" not in empty


def test_a_changed_row_changes_the_page(bench):
    rows, tables = bench
    found = rows.read()
    timed = [row for row in found if "median_s" in row]
    timed[0] |= {"median_s": 12345.0, "error": 0.5}
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(page, found) != page


def test_later_row_counts(bench, tmp_path):
    rows, _ = bench
    row = {"bench": "ops", "case": "a", "side": "ours", "dtype": "float32", "device": "here"}
    for median in (1.0, 2.0):
        rows.write(tmp_path, row | {"median_s": median})
    rows.write(tmp_path, row | {"device": "there", "median_s": 3.0})
    assert [r["median_s"] for r in rows.read(tmp_path)] == [2.0, 3.0]


def test_share_of_the_ceiling(bench, monkeypatch):
    """The longer of the times that bytes and products take at best, over the time taken."""
    import ceilings
    from timing import Samples

    copied = ceilings.Ceiling("copy", None, Samples("", seconds=[2.0]), 8.0, "gb_s")  # 4 bytes a second
    product = ceilings.Ceiling("GEMM", None, Samples("", seconds=[1.0]), 10.0, "tflop_s")
    monkeypatch.setattr(ceilings, "copy", lambda *_: copied)
    by = {"device": "cpu", "product": product}
    assert ceilings.share(4.0, num_bytes=8.0, flops=5.0, **by) == {"of_ceiling": 0.5, "ceiling": "copy"}
    assert ceilings.share(4.0, num_bytes=8.0, flops=30.0, **by) == {"of_ceiling": 0.75, "ceiling": "GEMM"}


def test_copying_and_products_are_measured(bench):
    import ceilings
    import torch

    copied, product = ceilings.copy("cpu", 2**16), ceilings.gemm("cpu", torch.float32, 32)
    assert copied.amount == 2 * 2**16 and product.amount == 2 * 32**3
    assert copied.figures() == {"gb_s": copied.rate / 1e9} and product.figures() == {"tflop_s": product.rate / 1e12}
    assert len(copied.samples.seconds) == 9 and ceilings.fp8_gemm("cpu") is None
    a, b = (torch.randn(32, 32).to(torch.float8_e4m3fn) for _ in range(2))
    found = ceilings.fp8_product(a, b, torch.full((32, 1), 2.0))  # each row of both twice as large
    torch.testing.assert_close(found.float(), 4 * a.float() @ b.float().t(), rtol=1e-2, atol=1e-2)


def full_scale_row(case, side, **more):
    return {"bench": "full_scale", "case": case, "side": side, "dtype": "bfloat16", "device": "card", **more}


def test_a_side_that_is_missing_says_why_in_the_table(bench):
    _, tables = bench
    found = [full_scale_row("a", "ours", median_s=0.5, samples=9), full_scale_row("a", "peer", missing="not installed")]
    lines = tables.full_scale_table(found).splitlines()
    assert "| a | ours | 500 | 9 |" in lines[2] and "| a | peer | not installed |" in lines[3]


def test_throughput_is_of_cases_that_were_measured_in_batches(bench):
    _, tables = bench
    found = [
        full_scale_row("step, a", "ours", batch=1, samples_per_s=10.0),
        full_scale_row("step, a, batch 4", "ours", batch=4, samples_per_s=16.0),
        full_scale_row("step, b", "ours", batch=1, samples_per_s=99.0),
    ]
    text = tables.throughput_table(found)
    assert "| case | side | batch 1 | batch 4 |" in text and "| step, a | ours | 10 | 16 |" in text and "99" not in text


def test_the_list_of_what_waits_names_every_section_and_every_gpu_test(bench):
    """And nothing that is not there."""
    _, tables = bench
    listed = tables.PAGE.read_text(encoding="utf-8").partition("## What waits for a GPU")[2]
    commands = "\n".join(re.findall(r"`([^`]+)`", listed))
    sections = set(re.findall(r"^section (\w+)", (BENCH / "gpu.sh").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for names in re.findall(r'SECTIONS="([^"]+)"', commands) for name in names.split()}
    assert named <= sections
    assert sections - named == {"gpu_tests", "tiny"}  # the former runs the files below, the latter measures nothing
    tests = BENCH.parent / "tests"
    mark = re.compile(r"\bpytest\.mark\.gpu\b")
    marked = {path.name for path in tests.glob("test_*.py") if mark.search(path.read_text(encoding="utf-8"))}
    files = set(re.findall(r"tests/(test_\w+\.py)", commands))
    assert files == marked
