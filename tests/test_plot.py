"""`uniworld plot`: what is in the curves, and what is said where there are none."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from uniworld import cli
from uniworld.train.plot import PANELS, labels, make_figure, plot, series, smooth

pytest.importorskip("matplotlib")


def write_run(folder, num_steps, offset=0.0):
    folder.mkdir(parents=True)
    records = [
        {"step": i, "loss": offset + 1 / i, "lr": 1e-3, "grad_norm": 2.0 / i, "images_per_s": 3.0, "step_s": 0.1}
        for i in range(1, num_steps + 1)
    ]
    records[1]["loss"] = None  # was not finite
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 99, "lo'  # cut off by a kill
    (folder / "metrics.jsonl").write_text(text)
    return records


def test_every_run_is_a_line_in_every_panel(tmp_path):
    runs = {"a": write_run(tmp_path / "a", 10), "b": write_run(tmp_path / "b", 20, 5.0)}
    figure = make_figure(runs)
    assert [axes.get_title() for axes in figure.axes] == [title for _, title, _ in PANELS]
    for axes, (key, _, _) in zip(figure.axes, PANELS):
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        for line, records in zip(axes.lines, runs.values()):
            expected = [math.nan if r.get(key) is None else r[key] for r in records]
            assert np.array_equal(line.get_xdata(), [r["step"] for r in records])
            assert np.array_equal(line.get_ydata(), expected, equal_nan=True)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    assert figure.axes[2].get_yscale() == "log"


def test_long_losses_are_smoothed_over_the_raw_ones(tmp_path):
    records = write_run(tmp_path / "a", 200)
    raw, smoothed = make_figure({"a": records}).axes[0].lines
    assert np.array_equal(raw.get_ydata(), series(records, "loss")[1], equal_nan=True)
    assert np.array_equal(smoothed.get_ydata(), smooth(raw.get_ydata()))
    assert raw.get_alpha() < 1 and smoothed.get_label() == "a"


def test_smoothing_is_a_weighted_mean_that_passes_gaps_over():
    values = [4.0, math.nan, 1.0, 7.0]
    weights = np.array([0.9**2, 0.9, 1.0])  # newest last
    found = smooth(values, 0.9)
    assert found[0] == found[1] == pytest.approx(4.0)
    assert found[3] == pytest.approx(float((weights * [4.0, 1.0, 7.0]).sum() / weights.sum()))


def test_command_writes_a_picture(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", 5)
    write_run(tmp_path / "b", 5)
    monkeypatch.setattr(sys, "argv", ["uniworld", "plot", str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    path = tmp_path / "a" / "curves.png"
    assert capsys.readouterr().out.strip() == str(path)
    picture = np.array(Image.open(path).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert plot([tmp_path / "b"], tmp_path / "other.png") == tmp_path / "other.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "other.png"]


def test_folders_that_have_no_curves(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no metrics.jsonl, so it is no run folder"):
        plot([tmp_path])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="metrics.jsonl has no step yet"):
        plot([tmp_path])


def test_alike_names_are_told_apart(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == [str(tmp_path / c / "run") for c in "xy"]
    assert labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
