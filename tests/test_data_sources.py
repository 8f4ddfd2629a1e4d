"""The three formats behind one interface, each checked against the library that defines it."""

import io
import json

import numpy as np
import pytest
from data_files import caption, edited, encoded, picture, turns, write_authors, write_shard
from PIL import Image

from uniworld.config import SourceConfig
from uniworld.data.bad import SampleError
from uniworld.data.dataset import Dataset, open_source
from uniworld.data.samples import Picture, make_sample
from uniworld.data.shards import expand_shards
from uniworld.data.sources import PackedRecords


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def only(path, **settings):
    (source,) = open_source(SourceConfig(path=str(path), **settings))
    return source


def pixels(image):
    return np.asarray(image.convert("RGB"))


# The authors' format


def test_authors_format(tmp_path):
    data = write_authors(tmp_path / "set", [0, 1, 2], sizes=((64, 48),))
    write_authors(tmp_path / "set", [1], name="plain", need_weight=False)
    first, second = open_source(SourceConfig(path=str(data)))
    assert (len(first), len(second)) == (3, 1)
    records = json.loads((tmp_path / "set" / "edits.json").read_text())
    for i, record in enumerate(records):
        sample = first[i]
        assert sample.id == f"edits.json:{i}"
        assert list(sample.conversations) == record["conversations"]
        paths = [str(tmp_path / "set" / "edits-images" / name) for name in record["image"]]
        assert [picture.name for picture in (*sample.references, sample.target)] == paths
        assert sample.need_weight and sample.target.size() == (48, 64)
        assert np.array_equal(pixels(sample.target.read()), pixels(Image.open(paths[-1])))
    assert not second[0].need_weight


def test_authors_lines(tmp_path, monkeypatch):
    write_authors(tmp_path / "set", [0])
    data = tmp_path / "set" / "data.txt"
    text = data.read_text()
    data.write_text(f"# a comment\n\n{text}")
    assert len(open_source(SourceConfig(path=str(data)))) == 1
    (tmp_path / "elsewhere.txt").write_text(text)  # relative to the working folder, as the authors' code reads it
    monkeypatch.chdir(tmp_path / "set")
    assert len(only(tmp_path / "elsewhere.txt")[0].references) == 0
    for line, message in {
        "edits-images,edits.json": "line 1: must be image_root,annotations.json,need_weight",
        "edits-images,edits.json,maybe": "line 1: need_weight='maybe': must be true or false",
        "nowhere,edits.json,true": "image_root .*nowhere: no such folder",
        "edits-images,none.json,true": "none.json: no such file",
        "edits-images,data.txt,true": "data.txt: not JSON",
        "": "has no line",
    }.items():
        data.write_text(line)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(SourceConfig(path=str(data)))


def focused(focus):
    return {"image": "a.png", "conversations": turns("x"), "focus": focus}


MISTAKES = {
    "no turns": ({"image": "a.png"}, "conversations=None: must be a list"),
    "a role": ({"image": "a.png", "conversations": [{"from": "user", "value": "x"}]}, "must be one of human, gpt"),
    "no target": ({"image": [], "conversations": turns("x")}, "image: must name at least the target"),
    "a number": ({"image": 3, "conversations": turns("x")}, "image=3: must be a path or a list of paths"),
    "too few marks": ({"image": ["a.png", "b.png"], "conversations": turns("x")}, "0 <image> for 1 inputs"),
    "too many marks": ({"image": "a.png", "conversations": turns("x", 2)}, "2 <image> for 0 inputs"),
    "nothing drawn": (
        {"image": "a.png", "conversations": [*turns("x")[:1], {"from": "gpt", "value": "ok"}]},
        "<gen_image> must stand once",
    ),
    "a reserved token": ({"image": "a.png", "conversations": turns("x<|im_end|>")}, "reserved token"),
    "half a turn": ({"image": "a.png", "conversations": [{"from": "human"}]}, r"conversations\[0\]: must have"),
    "no human": ({"image": "a.png", "conversations": turns("x")[1:]}, "must have a human turn"),
    "a list": ([1, 2], "must be an object"),
    "need_weight": ({"image": "a.png", "conversations": turns("x"), "need_weight": 3}, "need_weight=3"),
    "no boxes": (focused("face"), "focus='face': must be a list of at most 256 boxes"),
    "too many boxes": (focused([[0, 0, 1, 1]] * 257), "must be a list of at most 256 boxes"),
    "three edges": (focused([[0, 0, 1, 1], [0, 0, 1]]), r"focus\[1\]=.0, 0, 1.: must be left, upper, right, lower"),
    "pixels": (focused([[10, 10, 60, 60]]), "in that order from 0 to 1"),
    "edges in another order": (focused([[0.5, 0, 0.2, 1]]), "in that order from 0 to 1"),
    "words for numbers": (focused([["0", "0", "1", "1"]]), "in that order from 0 to 1"),
}


@pytest.mark.parametrize("record, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_annotations_are_named(tmp_path, record, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (tmp_path / "data.txt").write_text("images,a.json,true")
    dataset = Dataset([SourceConfig(path=str(tmp_path / "data.txt"))])
    with pytest.raises(SampleError, match=message):
        dataset[0]
    index = dataset.read_index()
    assert len(index.usable) == 0 and index.bad[0].id == "a.json:0"


def test_records_survive_packing():
    records = [{"a": "\u4e2d\u6587 \ud800"}, [], "x", None, 1.5]
    packed = PackedRecords.pack(records)
    assert [packed[i] for i in range(len(packed))] == records
    with pytest.raises(IndexError):
        packed[5]


# Shards


def write_samples(n, rng):
    """(base, edited, caption) of each."""
    bases = [picture(rng, 80, 64) for _ in range(n)]
    return [(base, edited(base), caption(rng, 6)) for base in bases]


def test_shards_against_webdataset(tmp_path):
    """Written by webdataset's own writer, read as webdataset reads them."""
    import webdataset

    samples = write_samples(5, np.random.default_rng(0))
    with webdataset.ShardWriter(f"{tmp_path}/shard-%03d.tar", maxcount=2, verbose=0) as writer:
        for i, (base, target, text) in enumerate(samples):
            annotation = {"conversations": turns(text, 1), "need_weight": i != 3, "focus": [[0, 0.25, 0.5, 1]] * i}
            writer.write({"__key__": f"s/{i:03d}", "0.png": base, "1.png": target, "json": annotation})
    for path in (f"{tmp_path}/shard-{{000..002}}.tar", str(tmp_path), f"{tmp_path}/shard-*.tar"):
        source = only(path)
        assert len(source) == 5
    theirs = list(webdataset.WebDataset(f"{tmp_path}/shard-{{000..002}}.tar", shardshuffle=False))
    for i, expected in enumerate(theirs):
        sample = source[i]
        assert sample.id == f"shard-{i // 2:03d}.tar:{expected['__key__']}"
        assert list(sample.conversations) == json.loads(expected["json"])["conversations"]
        assert sample.need_weight == (i != 3) and sample.focus == ((0.0, 0.25, 0.5, 1.0),) * i
        for mine, data in ((sample.references[0], expected["0.png"]), (sample.target, expected["1.png"])):
            assert mine.size() == (64, 80)
            assert np.array_equal(pixels(mine.read()), pixels(Image.open(io.BytesIO(data))))


def test_shard_of_captions(tmp_path):
    """Text to image as such shards usually are: KEY.jpg beside KEY.txt."""
    image = picture(np.random.default_rng(0), 40, 30)
    write_shard(tmp_path / "a.tar", {"1.jpg": encoded(image, "JPEG"), "1.txt": b"a cat", "2.txt": b"no picture"})
    source = only(tmp_path / "a.tar")
    assert [turn["value"] for turn in source[0].conversations] == ["a cat", "<gen_image>"]
    assert source[0].references == () and source[0].target.name == f"{tmp_path}/a.tar:1.jpg"
    with pytest.raises(ValueError, match="image: must name at least the target"):
        source[1]


def test_mistakes_in_shards_are_named(tmp_path):
    image = encoded(picture(np.random.default_rng(0), 40, 30))
    members = {
        "a.0.png": image, "a.2.png": image, "a.txt": b"x",
        "b.png": image,
        "c.png": image, "c.json": b"[1]",
        "d.png": image, "d.jpg": image, "d.txt": b"x",
        "e.png": image[:100], "e.txt": b"x",
        "f.png": image, "f.txt": b"\xff\xfe",
    }  # fmt: skip
    write_shard(tmp_path / "a.tar", members)
    messages = ["numbered", "has no b.json", "must be an object", "a second picture at place 0", None, "utf-8"]
    dataset = Dataset([SourceConfig(path=str(tmp_path / "a.tar"))])
    for number, message in enumerate(messages):
        if message:
            with pytest.raises(SampleError, match=message):
                dataset[number]
    with pytest.raises(ValueError, match=r"a.tar:e.png: broken image file"):
        dataset[4].target.read()
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="b.tar: not an uncompressed tar file"):
        only(tmp_path / "b.tar")
    with pytest.raises(FileNotFoundError, match="c-001.tar: no such shard"):
        expand_shards(f"{tmp_path}/c-{{001..003}}.tar")


def test_shards_are_scanned_once(tmp_path, monkeypatch):
    from uniworld.data import shards

    image = encoded(picture(np.random.default_rng(0), 40, 30))
    write_shard(tmp_path / "a.tar", {"1.png": image, "1.txt": b"x"})
    assert len(only(tmp_path / "a.tar")) == 1
    monkeypatch.setattr(shards, "read_members", None)
    assert len(only(tmp_path / "a.tar")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    write_shard(tmp_path / "a.tar", {"1.png": image, "1.txt": b"x", "2.png": image, "2.txt": b"y"})
    assert len(only(tmp_path / "a.tar")) == 2


# Tables


def test_table_of_the_authors_columns(tmp_path):
    import datasets

    samples = write_samples(3, np.random.default_rng(0))
    rows = {
        "image": [[base, target] for base, target, _ in samples],
        "conversations": [turns(text, 1) for _, _, text in samples],
        "need_weight": [True, False, None],
        "focus": [[[0.0, 0.25, 0.5, 1.0]], [], None],
        "unrelated": [1, 2, 3],
    }
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Image()),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "need_weight": datasets.Value("bool"),
            "focus": datasets.List(datasets.List(datasets.Value("float64"))),
            "unrelated": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "part.parquet")
    for path in (tmp_path / "saved", tmp_path / "files", tmp_path / "files" / "part.parquet"):
        source = only(path)
        assert len(source) == 3
        for i, row in enumerate(table):
            sample = source[i]
            assert list(sample.conversations) == row["conversations"]
            assert sample.target.size() == (64, 80) and len(sample.references) == 1
            assert np.array_equal(pixels(sample.references[0].read()), pixels(row["image"][0]))
            assert np.array_equal(pixels(sample.target.read()), pixels(row["image"][1]))
        assert [source[i].need_weight for i in range(3)] == [True, False, True]
        assert [source[i].focus for i in range(3)] == [((0.0, 0.25, 0.5, 1.0),), (), ()]


def test_table_with_other_column_names(tmp_path):
    """Encoded bytes without Hugging Face's metadata, as any program writes them; a path; no reference at all."""
    import pyarrow
    import pyarrow.parquet

    (base, target, text), _ = write_samples(2, np.random.default_rng(0))
    base.save(tmp_path / "base.png")
    table = pyarrow.table(
        {
            "edit_instruction": [text, text, None],
            "source": ["base.png", None, None],
            "after": [encoded(target), encoded(target), b"x"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "edits.parquet")
    columns = ("prompt=edit_instruction", "references=source", "target=after")
    source = only(tmp_path / "edits.parquet", columns=columns)
    assert [turn["value"] for turn in source[0].conversations] == [f"<image>\n{text}", "<gen_image>"]
    assert np.array_equal(pixels(source[0].references[0].read()), pixels(base))
    assert [turn["value"] for turn in source[1].conversations] == [text, "<gen_image>"]
    with pytest.raises(ValueError, match="prompt=None: must be text"):
        source[2]
    with pytest.raises(ValueError, match="must have the columns image and conversations, or prompt and target"):
        only(tmp_path / "edits.parquet")
    with pytest.raises(ValueError, match="has no column instruction; it has edit_instruction"):
        only(tmp_path / "edits.parquet", columns=("prompt=instruction",))
    with pytest.raises(ValueError, match="columns: 'caption=x' must be NAME=COLUMN"):
        only(tmp_path / "edits.parquet", columns=("caption=x",))


def test_broken_tables_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="a.parquet: cannot be read as parquet"):
        only(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="no parquet files and no saved dataset"):
        only(tmp_path / "nowhere.parquet")
    with pytest.raises(ValueError, match="cannot tell its kind"):
        only(tmp_path / "what.xyz")


# All together


def test_sources_are_numbered_through(tmp_path):
    data = write_authors(tmp_path / "set", [0, 1])
    write_authors(tmp_path / "set", [2, 0, 0], name="more")
    image = encoded(picture(np.random.default_rng(0), 40, 30))
    write_shard(tmp_path / "a.tar", {"1.png": image, "1.txt": b"x"})
    dataset = Dataset([SourceConfig(path=str(data)), SourceConfig(path=str(tmp_path / "a.tar"), weight=3.0)])
    assert len(dataset) == 6 and dataset.groups == [(0, 5, 1.0), (5, 6, 3.0)]
    ids = ["edits.json:0", "edits.json:1", "more.json:0", "more.json:1", "more.json:2", "a.tar:1"]
    assert [dataset[i].id for i in range(6)] == ids
    rows = dataset.read_index().rows
    assert rows[:, :3].tolist() == [[64, 64, 0], [64, 64, 1], [64, 64, 2], [64, 64, 0], [64, 64, 0], [30, 40, 0]]
    assert rows[5, 3] == len("x<gen_image>")
    with pytest.raises(IndexError):
        dataset[6]


def test_index_is_kept_and_knows_turned_pictures(tmp_path, monkeypatch):
    data = write_authors(tmp_path / "set", [0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(np.random.default_rng(0), 80, 40).save(tmp_path / "set" / "edits-images" / "0.png", exif=exif)
    dataset = Dataset([SourceConfig(path=str(data))])
    assert dataset.read_index().rows[0, :2].tolist() == [80, 40]
    assert dataset[0].target.read().size == (40, 80)
    monkeypatch.setattr(Picture, "size", None)
    assert dataset.read_index().rows[0, :2].tolist() == [80, 40]


def test_progress_of_indexing(tmp_path):
    told = []
    Dataset([SourceConfig(path=str(write_authors(tmp_path / "set", [0, 0])))]).read_index(
        lambda done, total: told.append((done, total))
    )
    assert told == [(2, 2)]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "file"))
    dataset = Dataset([SourceConfig(path=str(write_authors(tmp_path / "set", [0, 1])))])
    assert dataset.read_index().usable.tolist() == [0, 1]


def test_a_broken_cache_is_made_anew(tmp_path):
    dataset = Dataset([SourceConfig(path=str(write_authors(tmp_path / "set", [0, 1])))])
    rows = dataset.read_index().rows
    (stored,) = (tmp_path / "cache" / "data").glob("index-*.npz")
    stored.write_bytes(stored.read_bytes()[:50])
    assert np.array_equal(dataset.read_index().rows, rows)


def test_words_of_a_sample():
    sample = make_sample("x", turns("make it \u4e2d", 1), [Picture("a", "a"), Picture("b", "b")])
    assert sample.instruction == "make it \u4e2d"
    assert sample.num_text_bytes == len("<image>make it ") + 3 + len("<gen_image>")
