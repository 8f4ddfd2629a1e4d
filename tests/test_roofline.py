"""The roofline picture: points where rows say, the roof where the run's ceilings are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import roofline

    return roofline


def row(op, gb_s, tflop_s, dtype="bfloat16", **more):
    made = {"bench": "ops", "case": f"{op} N=1", "op": op, "side": "ours", "dtype": dtype, "gb_s": gb_s}
    return made | {"tflop_s": tflop_s} | more


ROWS = [
    row("product", 100.0, 50.0),
    row("product", 200.0, 20.0, "float32"),
    row("norm", 1500.0, 0.0),
    row("product", 1.0, 1.0, side="torch eager"),
    {**row("product", 1.0, 1.0), "bench": "dit_step"},
    {"bench": "ops", "case": "product N=1 forward + backward", "side": "ours", "dtype": "bfloat16", "op": "product"},
]
CEILINGS = [
    {"bench": "ops", "case": "ceiling, copy", "side": "torch", "dtype": "bfloat16", "gb_s": 2000.0},
    {"bench": "ops", "case": "ceiling, bfloat16 GEMM 8192", "side": "torch", "dtype": "bfloat16", "tflop_s": 700.0},
]


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_points_stand_where_their_rows_say(roofline):
    left, right = roofline.draw(ROWS + CEILINGS, "title").axes
    found = lines(left)
    assert found["bfloat16"] == ([500.0], [50.0])  # 50e12 FLOP/s over 100e9 B/s
    assert found["float32"] == ([100.0], [20.0])
    assert [bar.get_width() for bar in right.patches] == [1500.0]
    assert [text.get_text() for text in right.get_yticklabels()] == ["norm N=1"]
    assert left.get_xscale() == left.get_yscale() == "log"


def test_the_roof_is_that_of_the_run(roofline):
    left, right = roofline.draw(ROWS + CEILINGS, "title").axes
    x, y = lines(left)["copy, 2e+03 GB/s"]
    assert y == pytest.approx([value * 2e12 / 1e12 for value in x])  # FLOP/s at this many FLOPs for each byte
    assert lines(left)["bfloat16 GEMM 8192, 700 TFLOP/s"][1] == [700.0, 700.0]
    assert lines(right)["copy, 2e+03 GB/s"][0] == [2000.0, 2000.0]


def test_without_ceilings_it_says_so(roofline):
    figure = roofline.draw(ROWS, "title")
    assert figure.get_suptitle() == "title; the run measured no ceilings"
    assert lines(figure.axes[0]).keys() == {"bfloat16", "float32"}
    assert roofline.draw(ROWS + CEILINGS, "title").get_suptitle() == "title"


def test_it_is_written_as_a_picture(roofline, tmp_path):
    roofline.save(ROWS + CEILINGS, "title", tmp_path / "new" / "roofline.png")
    picture = np.array(Image.open(tmp_path / "new" / "roofline.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_the_page_shows_it_with_its_command():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "](images/roofline_cpu.png)" in page and "python bench/plot.py" in page
