"""The tables of docs/performance.md are those of the rows in bench/results."""

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
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.render(page, rows.read()) == page, "run python bench/tables.py"


def test_tables_without_rows_say_so(bench):
    _, tables = bench
    page = tables.PAGE.read_text(encoding="utf-8")
    empty = tables.render(page, [])
    assert empty.count(tables.NOT_MEASURED) == page.count("<!-- table: ") > 0
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
