"""The tables of docs/memory.md are those of the model's shapes."""

from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_tables_agree_with_shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import memory_tiers

    page = memory_tiers.PAGE.read_text(encoding="utf-8")
    assert memory_tiers.render(page) == page, "run python bench/memory_tiers.py"
    emptied = memory_tiers.MARKS.sub(r"\1\3", page)
    assert emptied != page and len(memory_tiers.MARKS.findall(page)) == len(memory_tiers.TABLES)
