"""The page about training data: its snippets work as they stand."""

import json
import re
from pathlib import Path

import numpy as np
import yaml
from data_files import picture, write_authors

from uniworld.config import TrainConfig, from_dict
from uniworld.data.dataset import Dataset

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text()


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def test_python_and_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    write_authors(tmp_path / "edits", [1, 0])
    exec(compile(block("python"), "data.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("edits.json 0")
    config = from_dict(TrainConfig, yaml.safe_load(block("yaml")))
    assert [source.weight for source in config.data.sources] == [3.0, 1.0, 1.0]


def test_annotations(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("in/1.png", "out/1.png"):
        picture(np.random.default_rng(0), 64, 64).save(tmp_path / name)
    (tmp_path / "a.json").write_text(block("json"))
    (tmp_path / "data.txt").write_text(".,a.json,true")
    config = from_dict(TrainConfig, {"data": {"sources": [{"path": str(tmp_path / "data.txt")}]}})
    sample = Dataset(config.data.sources)[0]
    assert sample.instruction == "make it snow" and sample.target.size() == (64, 64)
    assert json.loads(block("json"))[0]["image"] == ["in/1.png", "out/1.png"]
