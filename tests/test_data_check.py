"""`uniworld check-data`: every kind of mistake is found, counted and shown, and clean data passes."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from data_files import data_config, edited, encoded, picture, write_authors, write_shard
from PIL import Image

from uniworld import cli
from uniworld.data.check import check, spaced, view
from uniworld.data.check_page import TINT, overlay
from uniworld.data.dataset import Dataset


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["uniworld", "check-data", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def cells(out, source):
    """The table's row of a source."""
    (line,) = [line for line in out.splitlines() if line.split()[:1] == [source]]
    return line.split()[1:]


def test_clean_data_passes(run, tmp_path):
    write_authors(tmp_path / "set", [0, 1, 2, 1])
    write_authors(tmp_path / "set", [1, 0], name="plain", need_weight=False)
    code, out, err = run("set/data.txt", "--workers", 2, "--anchor-px", 4096)
    assert code == 0, err
    assert cells(out, "set/edits.json") == ["4", "4", "1/2/1", "25%", "0", "0"]
    assert cells(out, "set/plain.json") == ["2", "2", "1/1/0", "-", "0", "0"]


def test_every_mistake_is_found(run, tmp_path):
    folder = tmp_path / "set"
    write_authors(folder, [1] * 8, sizes=((256, 256),))
    images = folder / "edits-images"
    (images / "0.png").unlink()
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-300])
    (images / "2-0.png").write_bytes(b"no picture")
    (images / "3.png").write_bytes(b"")
    edited(Image.open(images / "4-0.png"), 0.0004).save(images / "4.png")  # under 0.1 %
    picture(np.random.default_rng(0), 1000, 4).save(images / "5-0.png")  # over 200 : 1
    text = (folder / "edits.json").read_text()
    assert text.count('"value": "<image>') == 8
    parts = text.split('"value": "<image>')
    (folder / "edits.json").write_text('"value": "<image>'.join(parts[:-1]) + '"value": "' + parts[-1])  # of the last
    code, out, _ = run("set/data.txt", "--workers", 0, "--quiet", "--anchor-px", 65536)
    assert code == 1
    assert cells(out, "set/edits.json") == ["8", "8", "0/1/0", "25%", "0", "7"]
    for i, reason in enumerate(
        ["0.png: no such file", "1.png: broken image file", "2-0.png: not an image", "3.png: the file is empty",
         "4.png: edited share=", "5-0.png: image: 1000x4 px, sides may differ"]
    ):  # fmt: skip
        assert re.search(rf"^edits.json:{i}: .*{re.escape(reason)}", out, re.MULTILINE), reason
    assert re.search(r"^edits.json:7: .*edits.json: conversations: 0 <image> for 1 inputs", out, re.MULTILINE)


def test_training_skips_what_the_check_finds(tmp_path, monkeypatch):
    """Both judge alike: the loader's bad samples are the check's errors."""
    from test_data_loader import ids

    from uniworld.data.loader import Loader

    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    data = write_authors(folder, [1] * 6, sizes=((256, 256),))
    images = folder / "edits-images"
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-300])
    edited(Image.open(images / "4-0.png"), 0.0004).save(images / "4.png")
    config = data_config(data, anchor_px=256 * 256, max_bad_share=0.9)
    (report,) = check(Dataset(config.data.sources), config.data)
    loader = Loader(config, processor=tiny_processor())
    ids(loader, 6)
    assert {(bad.id, bad.reason) for bad in report.errors} == {(bad.id, bad.reason) for bad in loader.bad.last}
    assert len(report.errors) == 2


def tiny_processor():
    import json

    from golden import ROOT

    from uniworld.models.prompts import PromptProcessor
    from uniworld.models.tokenizers import load_tokenizer
    from uniworld.models.vision_processor import VisionProcessor

    preprocessor = json.loads((ROOT / "univa" / "preprocessor_config.json").read_text())
    return PromptProcessor(load_tokenizer(ROOT / "univa", "Qwen2Tokenizer"), VisionProcessor(preprocessor))


def test_pairs_without_a_region_are_told(run, tmp_path):
    """Equal pictures, and many small edits, which the authors' rule drops; the filter for them keeps the second."""
    write_authors(tmp_path / "set", [1, 1, 1], sizes=((256, 256),))
    images = tmp_path / "set" / "edits-images"
    base = Image.open(images / "0-0.png")
    base.save(images / "0.png")
    pixels = np.array(Image.open(images / "1-0.png"))
    for y in range(20, 240, 55):
        for x in range(20, 240, 55):
            pixels[y : y + 12, x : x + 12] += 128
    Image.fromarray(pixels).save(images / "1.png")
    code, out, _ = run("set/data.txt", "--anchor-px", 256 * 256)
    assert code == 0 and cells(out, "set/edits.json")[-2:] == ["2", "0"]
    config = data_config(tmp_path / "set" / "data.txt", anchor_px=256 * 256, keep_scattered=True).data
    (report,) = check(Dataset(config.sources), config)
    assert report.num_unchanged == 1


class Page(HTMLParser):
    """Collects tags and texts, and that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.sources = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page(run, tmp_path):
    write_authors(tmp_path / "set", [0, 1, 2, 1, 1])
    (tmp_path / "set" / "edits-images" / "4.png").unlink()
    code, out, _ = run("set/data.txt", "--page", "page.html", "--shown", 4, "--anchor-px", 4096)
    assert code == 1 and out.endswith("page.html\n")
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("article") == 4 and page.tags.count("img") == 1 + 3 + 4 + 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "1 of 5 samples cannot be used" in page.texts
    assert any(text.startswith("edited: 25.0% of the latents, weight 3.00") for text in page.texts)


def test_page_escapes_what_the_data_say(run, tmp_path):
    image = encoded(picture(np.random.default_rng(0), 64, 64))
    evil = "<script>alert(1)</script>\x1b[31m"
    write_shard(tmp_path / "<b>.tar", {"1.png": image, "1.txt": evil.encode(), "<i>.png": image[:99], "<i>.txt": b"x"})
    code, out, _ = run("<b>.tar", "--page", "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert code == 1 and not {"script", "b>", "i"} & set(page.tags) and "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert "\x1b" not in out


def test_names_bring_no_escape_codes_to_the_terminal(run, tmp_path):
    import json

    (tmp_path / "images").mkdir()
    record = {"image": "a\x1b[2J.png", "conversations": [{"from": "x\x1b]0;t", "value": ""}]}
    (tmp_path / "a.json").write_text(json.dumps([record, {**record, "image": 1}]))
    (tmp_path / "data.txt").write_text("images,a.json,true\n")
    code, out, _ = run("data.txt")
    assert code == 1 and "\x1b" not in out


def test_overlay_shows_the_mask(tmp_path):
    data = write_authors(tmp_path / "set", [1], sizes=((128, 64),))
    config = data_config(data, target_fit="crop", anchor_px=64 * 64).data
    seen = view(Dataset(config.sources)[0], config)
    assert seen.mask.shape == (8, 8) and seen.mask.any() and not seen.mask.all()
    pixels = np.asarray(overlay(seen, config)).astype(int)
    assert pixels.shape == (64, 64, 3)
    edited_pixels = np.kron(seen.mask != 0, np.ones((8, 8), bool))
    assert pixels[edited_pixels][:, 0].min() >= int(0.35 * TINT[0])
    assert pixels[~edited_pixels].max() <= 0.4 * 255


def test_limit_spreads_over_each_source(run, tmp_path):
    write_authors(tmp_path / "set", [0] * 7)
    write_authors(tmp_path / "set", [0] * 2, name="more")
    dataset = Dataset(data_config(tmp_path / "set" / "data.txt").data.sources)
    assert spaced(dataset, 0, 3) == [0, 2, 4] and spaced(dataset, 1, 3) == [7, 8] and spaced(dataset, 1, 1) == [7]
    code, out, _ = run("set/data.txt", "--limit", 3)
    assert code == 0 and cells(out, "set/edits.json")[:2] == ["7", "3"]
    assert cells(out, "set/more.json")[:2] == ["2", "2"]


def test_a_config_names_the_sources(run, tmp_path):
    write_authors(tmp_path / "set", [0, 1])
    (tmp_path / "run.yaml").write_text("data: {sources: [{path: set/data.txt}], anchor_px: 4096, num_ratios: 1}")
    code, out, _ = run("run.yaml")
    assert code == 0 and cells(out, "set/edits.json")[:2] == ["2", "2"]


BAD = {
    "nowhere": (["none.txt"], "none.txt: no such file"),
    "kind": (["set/data.txt", "--kind", "zip"], "kind='zip': must be one of auto, authors, webdataset, parquet"),
    "unknown": (["set"], "no parquet files and no saved dataset"),
    "page": (["set/data.txt", "--page", "page.txt"], "--page page.txt: must end in .html"),
    "page folder": (["set/data.txt", "--page", "no/page.html"], "the directory no does not exist"),
    "config and more": (["run.yaml", "set/data.txt"], "a YAML file stands alone"),
    "config and kind": (["run.yaml", "--kind", "authors"], "--kind: the config says it"),
}


@pytest.mark.parametrize("args, message", BAD.values(), ids=BAD)
def test_mistakes_of_the_user(run, tmp_path, args, message):
    write_authors(tmp_path / "set", [0])
    code, out, err = run(*args)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1
