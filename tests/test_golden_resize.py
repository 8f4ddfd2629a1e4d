"""The size rule against the authors' table."""

import csv
from pathlib import Path

import pytest

from uniworld.models.image_size import RATIOS, output_size

TABLE = Path(__file__).parent / "data" / "golden_resize.csv"


def table() -> list[dict[str, int]]:
    with TABLE.open() as file:
        return [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_sizes_are_the_authors():
    rows = table()
    assert len(rows) == 477 and {row["num_ratios"] for row in rows} == set(RATIOS)
    for row in rows:
        expected = row.pop("out_height"), row.pop("out_width")
        if expected != (0, 0):
            assert output_size(**row) == expected, row


def test_small_anchors_give_the_smallest_size():
    refused = [row for row in table() if row["out_height"] == 0]
    assert refused
    for row in refused:
        size = output_size(row["height"], row["width"], row["anchor_px"])
        assert size == (288, 512), row
    assert output_size(300, 300, 1) == (32, 32)
    assert output_size(300, 300, 1, multiple=16) == (16, 16)


@pytest.mark.parametrize("ratio", RATIOS[11])
def test_each_ratio_is_reached(ratio):
    width, height = ratio
    out_height, out_width = output_size(100 * height, 100 * width, 1024 * 1024)
    assert out_width * height == out_height * width
    assert out_height % 32 == out_width % 32 == 0
    assert 0.7 < out_height * out_width / 1024**2 < 1.35


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"height": 0, "width": 5, "anchor_px": 1024}, "height=0: must be at least 1"),
        ({"height": 5, "width": -1, "anchor_px": 1024}, "width=-1: must be at least 1"),
        ({"height": 5, "width": 5, "anchor_px": 0}, "anchor_px=0: must be at least 1"),
        ({"height": 5, "width": 5, "anchor_px": 9, "multiple": 0}, "multiple=0: must be at least 1"),
        ({"height": 5, "width": 5, "anchor_px": 9, "num_ratios": 3}, "num_ratios=3: must be one of 11, 9, 7, 5, 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        output_size(**arguments)
