"""`uniworld make-data`: the files are right, the same whatever made them, and ready to train on."""

import errno
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniworld import cli
from uniworld.config import SourceConfig
from uniworld.data.dataset import Dataset
from uniworld.data.masks import LATENT_PX, region_mask
from uniworld.data.scenes import make, tasks
from uniworld.data.scenes.edits import KINDS, edit_mask
from uniworld.data.scenes.graph import is_held_out
from uniworld.data.scenes.make import DataPlan, make_data
from uniworld.data.scenes.render import render
from uniworld.data.scenes.tasks import KIND_WEIGHTS, MIXTURE, make_item
from uniworld.data.scenes.typical import TEXTURE
from uniworld.data.scenes.wording import WORDINGS
from uniworld.models.prompts import chat_text, training_pieces

NUM = 64
LOCAL_KINDS = ("add", "remove", "replace", "adjust", "action")  # that leave most of the picture as it is


@pytest.fixture(scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SHARD_ITEMS", 8)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_shards):
    """Data of all tasks in both formats, by two processes."""
    folder = tmp_path_factory.mktemp("made") / "data"
    told = []
    assert make_data(DataPlan(num=NUM), folder, num_workers=2, progress=lambda *a: told.append(a)) == NUM
    assert told[0] == (0, NUM) and told[-1] == (NUM, NUM)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["uniworld", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def annotations(folder, task):
    return json.loads((folder / "annotations" / f"{task}.json").read_text(encoding="utf-8"))


# --- items


@pytest.mark.parametrize("task", MIXTURE)
def test_an_item_follows_from_its_seed(task):
    first, second, other = make_item(task, 5), make_item(task, 5), make_item(task, 6)
    assert first.record() == second.record() and first.facts == second.facts
    assert all(np.array_equal(a, b) for a, b in zip(first.pictures, second.pictures, strict=True))
    assert first.record() != other.record()
    assert make_item(task, 5, "held-out").scenes != first.scenes


@pytest.mark.parametrize(("task", "kind"), [(task, kind) for task, kinds in KIND_WEIGHTS.items() for kind in kinds])
def test_every_kind_can_be_asked_for(task, kind):
    for seed, language in ((1, "en"), (2, "zh")):
        item = make_item(task, seed, "held-out", kind=kind, language=language, size_px=64)
        assert (item.task, item.kind, item.language) == (task, kind, language)
        assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in item.pictures)
        text = item.conversations[0]["value"]
        assert bool(re.search("[\u4e00-\u9fff]", text)) == (language == "zh"), text
        if len(item.pictures) > 1:
            assert not np.array_equal(item.pictures[0], item.pictures[-1])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="task='draw': must be one of understanding, t2i"):
        make_item("draw", 0)
    with pytest.raises(ValueError, match="split='test': must be one of train, held-out"):
        make_item("edit", 0, "test")
    with pytest.raises(ValueError, match="kind='paint'"):
        make_item("edit", 0, kind="paint")
    with pytest.raises(ValueError, match="seed=-1"):
        make_item("edit", -1)


@pytest.mark.parametrize("task", MIXTURE)
def test_held_out_pairs_stay_out_of_training(task):
    for seed in range(30):
        train, held_out = (make_item(task, seed, split, size_px=16) for split in ("train", "held-out"))
        pairs = [(t.shape, t.colour) for scene in train.scenes for t in scene.things]
        assert not any(is_held_out(*pair) for pair in pairs)
        # Of prompts that name no colour, things have the typical one.
        if task != "t2i" or all(want.description.colour for want in held_out.facts.wants):
            assert any(is_held_out(t.shape, t.colour) for scene in held_out.scenes for t in scene.things)
        seeds, others = ({scene.seed for scene in item.scenes} - {TEXTURE} for item in (train, held_out))
        assert seeds.isdisjoint(others)


@pytest.mark.parametrize("task", ["edit", "perceive", "compose", "keep", "understanding"])
def test_pictures_stand_behind_the_words_as_in_a_request(task):
    item = make_item(task, 3, size_px=16)
    num = len(item.pictures) - (task != "understanding")
    words, pictures = item.conversations[0]["value"].split("<image>", 1)
    assert num >= 1 and words and pictures == "<image>" * (num - 1)
    trained = training_pieces([item.conversations[0], {"from": "gpt", "value": "<gen_image>"}])
    assert chat_text(words, num).startswith(trained[0])


def test_what_is_kept_is_the_same_picture():
    items = [make_item("keep", seed, size_px=32) for seed in range(24)]
    for item in items:
        shown, wanted = item.pictures
        assert np.array_equal(shown, wanted) and not item.need_weight
        assert item.conversations[-1]["value"] == "<gen_image>" and item.focus()
    assert {item.language for item in items} == {"en", "zh"} and len({item.scenes[0].style for item in items}) > 2


def test_understanding_only_talks():
    item = make_item("understanding", 3)
    assert len(item.pictures) == 1
    assert [turn["value"].count("<image>") for turn in item.conversations] == [1] + [0] * (2 * len(item.facts) - 1)
    assert [turn["from"] for turn in item.conversations] == ["human", "gpt"] * len(item.facts)
    assert [t["value"] for t in item.conversations[1::2]] == [question.answer for question in item.facts]
    assert not any("<gen_image>" in turn["value"] for turn in item.conversations)


def test_region_masks_agree_with_exact_ones():
    """The project's own pipeline finds the edited region in the pictures; the renders say what it really is."""
    overlaps = []
    for kind in KINDS:
        for seed in range(24):
            item = make_item("edit", seed, kind=kind)
            before, after = item.pictures
            found = region_mask([Image.fromarray(before)], Image.fromarray(after)) != 0  # EditTooSmallError of none
            exact = edit_mask(before, after)
            assert exact.any()
            if kind not in LOCAL_KINDS or item.facts.changes[0].kind == "light":
                continue
            strong = np.abs(before.astype(int) - after).max(-1) > 24  # what an eye sees: not the last bit of a shadow
            overlaps.append((found & cells(strong)).sum() / (found | cells(strong)).sum())
            assert cells(exact)[cells(strong)].all()
    print(f"IoU of {len(overlaps)} masks: mean {np.mean(overlaps):.3f}, median {np.median(overlaps):.3f}")
    assert np.mean(overlaps) > 0.75


def test_an_edit_that_nobody_sees_is_drawn_anew(monkeypatch):
    seen = make_item("edit", 0, kind="remove")
    shares = iter((0.0, 0.0039, 0.0041))
    monkeypatch.setattr(tasks, "visible_share", lambda before, after: next(shares))
    assert make_item("edit", 0, kind="remove").facts != seen.facts
    assert next(shares, None) is None
    monkeypatch.undo()
    grey = np.full((16, 16, 3), 90, np.uint8)
    brighter = grey.copy()
    brighter[:4, :8] += 18
    brighter[8:, :] += 17
    assert tasks.visible_share(grey, brighter) == 32 / 256


def cells(mask):
    """The latent pixels that hold a pixel of the mask."""
    height, width = (side // LATENT_PX for side in mask.shape)
    return mask.reshape(height, LATENT_PX, width, LATENT_PX).any((1, 3))


def test_the_page_on_scenes(capsys):
    """Its Python runs, and the numbers of templates in it are those there are."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "scenes.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "scenes.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].endswith(" True")
    said = re.search(r"(\d+) and (\d+) templates", page).groups()
    assert said == tuple(str(sum(map(len, words.phrases.values()))) for words in WORDINGS.values())


# --- files


def test_bytes_do_not_depend_on_the_workers(made, tmp_path, small_shards):
    assert make_data(DataPlan(num=NUM), tmp_path / "alone", num_workers=1) == NUM
    assert contents(tmp_path / "alone") == contents(made)


def test_every_task_has_its_share(made):
    counts = {task: len(annotations(made, task)) for task in MIXTURE}
    assert sum(counts.values()) == NUM and counts == DataPlan(num=NUM).counts
    assert all(abs(count - NUM * MIXTURE[task]) < 1 for task, count in counts.items())
    assert sorted(DataPlan(num=3, tasks=("edit", "t2i")).counts.values()) == [1, 2]
    assert not list(made.rglob("*.part"))


def test_both_formats_hold_the_same(made):
    for task in MIXTURE:
        in_tars = {}
        for shard in sorted((made / ("chat" if task == "understanding" else "shards")).glob(f"{task}-*.tar")):
            with tarfile.open(shard) as tar:
                in_tars |= {member.name: tar.extractfile(member).read() for member in tar}
        for record in annotations(made, task):
            key = Path(record["image"][0]).name.split(".")[0]
            stored = json.loads(in_tars.pop(f"{key}.json"))
            for place, name in enumerate(record.pop("image")):
                assert in_tars.pop(f"{key}.{place}.png") == (made / "images" / name).read_bytes()
            assert stored == record
        assert not in_tars


def test_a_record_makes_its_item_again(made):
    for task in MIXTURE:
        record = annotations(made, task)[-1]
        item = make_item(task, tuple(record["seed"]), record["split"])
        assert record == {"id": record["id"], "image": record["image"]} | json.loads(json.dumps(item.record()))
        assert item.conversations == record["conversations"] and item.kind == record["kind"]
        for name, picture in zip(record["image"], item.pictures, strict=True):
            assert np.array_equal(np.asarray(Image.open(made / "images" / name)), picture)


def test_the_focus_is_on_the_things_of_the_target(made):
    for task in MIXTURE:
        for record in annotations(made, task):
            item = make_item(task, tuple(record["seed"]), record["split"])
            ids = render(item.scenes[-1], 64).ids
            assert (len(record["focus"]) == 0) == (task == "understanding")
            if task == "understanding":
                continue
            places = [np.argwhere(ids == thing) for thing in sorted(set(ids.ravel().tolist()) - {0})]
            edges = [(*place.min(0)[::-1], *(place.max(0)[::-1] + 1)) for place in places]
            np.testing.assert_allclose(record["focus"], np.array(edges) / 64, atol=1e-4)


def test_it_loads_as_training_data(made, monkeypatch, tmp_path):
    monkeypatch.setenv("UNIWORLD_CACHE", str(tmp_path))
    numbers = []
    for path in (made / "data.txt", made / "shards"):
        dataset = Dataset([SourceConfig(path=str(path))])
        numbers.append(len(dataset))
        by_references = [0, 0, 0]
        for sample in map(dataset.__getitem__, range(len(dataset))):
            assert sample.instruction and sample.target.size() == (128, 128)
            by_references[len(sample.references)] += 1
            assert sample.references or not sample.need_weight
        assert by_references[0] == DataPlan(num=NUM).counts["t2i"]
        assert by_references[2] == DataPlan(num=NUM).counts["compose"]
    assert numbers == [NUM - DataPlan(num=NUM).counts["understanding"]] * 2


def test_check_data_finds_no_error(made, run):
    code, out, err = run("check-data", made / "data.txt", made / "shards", "-q", "--workers", 0, "--anchor-px", 16384)
    assert code == 0, out + err
    rows = [line.split() for line in out.splitlines() if str(made) in line]
    assert len(rows) == 6 and all(row[-1] == "0" for row in rows)


def test_it_goes_on_where_it_stopped(made, tmp_path, small_shards):
    folder, plan = tmp_path / "data", DataPlan(num=NUM)
    shutil.copytree(made, folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.tar")}
    lost = sorted(folder.glob("shards/edit-*.tar"))[1]
    lost.unlink()
    (lost.parent / f".{lost.name}.part").write_bytes(b"half a shard")
    shutil.rmtree(folder / "images" / "t2i-00000")
    assert make_data(plan, folder, num_workers=1) == 16  # two shards
    assert contents(folder) == contents(made)
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {lost, folder / "shards" / "t2i-00000.tar"}
    assert make_data(plan, folder, num_workers=1) == 0


def test_interrupted_before_the_lists_are_joined(made, tmp_path, small_shards, monkeypatch):
    folder, plan = tmp_path / "data", DataPlan(num=NUM)
    first = make.make_shard

    def stop_at_edits(shard, *args):
        if shard.task == "edit" and shard.number == 1:
            raise KeyboardInterrupt
        return first(shard, *args)

    monkeypatch.setattr(make, "make_shard", stop_at_edits)
    with pytest.raises(KeyboardInterrupt):
        make_data(plan, folder)
    assert not (folder / "data.txt").exists()
    monkeypatch.setattr(make, "make_shard", first)
    assert 0 < make_data(plan, folder) < NUM
    assert contents(folder) == contents(made)


def test_a_full_disk(tmp_path, small_shards, monkeypatch):
    def full(picture):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(make, "png", full)
    message = f"{tmp_path / 'data'}: 0 of 9 items are there, then: .*No space left"
    for num_workers in (1, 2):
        with pytest.raises(OSError, match=message):
            make_data(DataPlan(num=9, tasks=("t2i",)), tmp_path / "data", num_workers=num_workers)
    monkeypatch.undo()
    assert make_data(DataPlan(num=9, tasks=("t2i",)), tmp_path / "data") == 9


@pytest.mark.parametrize(
    ("kind", "there", "absent"), [("webdataset", "shards", "images"), ("authors", "images", "shards")]
)
def test_one_format_alone(kind, there, absent, made, tmp_path, small_shards):
    make_data(DataPlan(num=NUM, format=kind), tmp_path / "data")
    found, every = contents(tmp_path / "data"), contents(made)
    found.pop("data.json")
    assert all(every[name] == content for name, content in found.items())
    assert (tmp_path / "data" / there).is_dir() and not (tmp_path / "data" / absent).exists()


def test_other_folders_are_left_alone(made, tmp_path, small_shards):
    before = contents(made)
    with pytest.raises(ValueError, match=r"holds other data \(seed=0, asked for 1\)"):
        make_data(DataPlan(num=NUM, seed=1), made)
    assert contents(made) == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and has no data.json"):
        make_data(DataPlan(num=1), tmp_path)


def test_command(run, tmp_path):
    args = ("make-data", "--num", 6, "-o", tmp_path / "data", "--tasks", "edit,understanding", "--workers", 1)
    code, out, err = run(*args)
    assert code == 0, err
    assert out.splitlines() == [str(tmp_path / "data" / "shards"), str(tmp_path / "data" / "data.txt")]
    assert "6 pairs in" in err and "pairs/s" in err
    assert len(annotations(tmp_path / "data", "edit")) == 4
    code, _, err = run(*args)
    assert code == 0 and "0 pairs in" in err and "6 were there" in err


def test_some_kinds_alone(run, tmp_path):
    asked = {"t2i": {"counting", "position"}, "edit": {"add"}, "compose": {"compose"}}
    args = ("make-data", "--num", 30, "-o", tmp_path / "data", "--format", "authors", "--workers", 1)
    args += ("--tasks", ",".join(asked))
    code, _, err = run(*args, "--kinds", "counting,position, add")
    assert code == 0, err
    for task, kinds in asked.items():
        records = annotations(tmp_path / "data", task)
        assert {record["kind"] for record in records} == kinds
        again = make_item(task, tuple(records[0]["seed"]), kind=records[0]["kind"])
        assert again.conversations == records[0]["conversations"]
    code, _, err = run(*args)
    assert code == 2 and "holds other data (kinds=['counting', 'position', 'add'], asked for None)" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", "test"), "split='test': must be one of train, held-out"),
        (("--tasks", "edit,draw"), "task='draw': must be one of understanding"),
        (("--tasks", "edit,edit"), "tasks=edit,edit: must name each task once"),
        (("--tasks", "t2i,keep", "--kinds", "add"), "kind='add': must be one of single object, two objects, counting"),
        (("--format", "zip"), "format='zip': must be one of both, webdataset, authors"),
        (("--size", 100), "size_px=100: must be a positive multiple of 16"),
    ],
)
def test_wrong_options(options, message, run, tmp_path):
    code, _, err = run("make-data", "--num", 2, "-o", tmp_path / "data", *options)
    assert code == 2 and err.splitlines() == [f"error: {err.strip().removeprefix('error: ')}"] and message in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_unwritable_output(where, run, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run("make-data", "--num", 2, "-o", tmp_path / where)
    assert code == 2 and err.startswith("error: ") and str(tmp_path / "file") in err and not out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output(run, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = run("make-data", "--num", 2, "-o", tmp_path / "data")
    assert code == 2 and "Permission denied" in err
