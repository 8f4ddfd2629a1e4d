"""Scores of scenes: exact answers score near 100 %, wrong ones near 0, spoiled ones in between; the command."""

import dataclasses
import json

import cv2
import numpy as np
import pytest

from uniworld import cli
from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.load import drawing_defaults
from uniworld.checkpoint.tiny import tiny_dir
from uniworld.data.scenes import perception
from uniworld.data.scenes.captions import Prompt, Want
from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import COLOURS, POSES, Scene, Thing, has_held_out
from uniworld.data.scenes.render import render
from uniworld.eval import scenes_table
from uniworld.eval.scenes_answers import is_right, normalised
from uniworld.eval.scenes_boxes import read_boxes
from uniworld.eval.scenes_columns import COLUMNS, chosen, item_of, question_index
from uniworld.eval.scenes_compare import psnr
from uniworld.eval.scenes_edits import judge_edit
from uniworld.eval.scenes_maps import box_iou, edge_f1, joint_error, matched, score_map
from uniworld.eval.scenes_reader import read_scene
from uniworld.eval.scenes_score import JUDGES, Verdict
from uniworld.eval.scenes_suite import conversation, read_picture

EDIT = [column for column in COLUMNS if column.group == "edit"]
PERCEIVE = [column for column in COLUMNS if column.group == "perceive"]
BALL = Thing(shape="ball", colour="red", size="large", x=-0.5, z=0.3)
CUBE = Thing(shape="cube", colour="blue", size="medium", x=0.5, z=0.6, yaw=20.0)
NOISE = np.random.default_rng(3).integers(0, 256, (128, 128, 3), np.uint8)


def looks(scene):
    return sorted((thing.shape, thing.colour) for thing in scene.things)


# Items


def test_items_are_held_out_and_the_same_again():
    for column in COLUMNS[::4]:
        item = item_of(column, 0, 3, 128)
        assert item.split == "held-out"
        assert any(has_held_out(scene) for scene in item.scenes)
        again = item_of(column, 0, 3, 128)
        assert again.record() == item.record()
        assert all((a == b).all() for a, b in zip(item.pictures, again.pictures))
        assert item_of(column, 1, 3, 128).scenes != item.scenes


def test_chosen_columns():
    assert chosen(None) == COLUMNS
    assert [column.name for column in chosen("routing, edit add")] == ["edit add", "routing"]
    with pytest.raises(ValueError, match="--columns edits: must be of understanding, t2i"):
        chosen("edits")


# The reader


@pytest.mark.parametrize(
    "things",
    [
        (BALL, CUBE),
        (Thing(shape="torus", colour="yellow", size="large", x=0.1, z=0.3),),
        (Thing(shape="doll", colour="green", size="large", x=-0.2, z=0.2, pose=POSES["arms up"]),),
    ],
)
def test_reads_what_was_drawn(things):
    scene = Scene(things=things, background="desert", light="right")
    found = read_scene(render(scene).image).scene
    assert looks(found) == looks(scene)
    assert found.background == "desert"
    for thing in scene.things:
        (same,) = [other for other in found.things if other.shape == thing.shape]
        assert abs(same.x - thing.x) < 0.08
        assert abs(same.z - thing.z) < 0.1
        assert same.size == thing.size


def test_reads_a_picture_of_another_size_that_is_not_sharp():
    scene = Scene(things=(BALL, CUBE), background="snow")
    soft = cv2.GaussianBlur(render(scene, 256).image, (0, 0), 2.0)
    assert looks(read_scene(soft).scene) == looks(scene)


def test_reads_nothing_where_nothing_is():
    for background in ("tiles", "meadow", "night"):
        found = read_scene(render(Scene(things=(), background=background)).image)
        assert found.scene.things == ()
        assert found.scene.background == background
    assert read_scene(NOISE).scene.things == ()


def test_a_prompt_holds_for_the_right_picture_only():
    wants = tuple(Want(description=Description(shape=t.shape, colour=t.colour)) for t in (BALL, CUBE))
    prompt = Prompt(kind="position", language="en", text="", wants=wants, relation="left of")
    scene = Scene(things=(BALL, CUBE))
    swapped = scene.with_thing(0, x=CUBE.x, z=CUBE.z).with_thing(1, x=BALL.x, z=BALL.z)
    assert prompt.holds(read_scene(render(scene).image).scene)
    assert not prompt.holds(read_scene(render(swapped).image).scene)
    assert not prompt.holds(read_scene(render(scene.with_thing(0, colour="green")).image).scene)


# Edits


@pytest.mark.parametrize("column", EDIT, ids=lambda column: column.kind)
def test_edits(column):
    item = item_of(column, 5, 0, 128)
    before, after = item.pictures
    verdict = judge_edit(item.facts, after)
    assert verdict.success, verdict.reasons
    assert verdict.psnr_db in (None, 99.0) and verdict.inside_db == 99.0
    undone = judge_edit(item.facts, before)
    assert not undone.changed and 0 < undone.inside_db < 40
    assert not judge_edit(item.facts, item_of(column, 5, 1, 128).pictures[1]).success


def test_noise_is_no_edit():
    for column in EDIT[1:4]:
        assert not judge_edit(item_of(column, 5, 1, 128).facts, NOISE).success


def test_an_edit_that_changes_more_than_was_asked_is_wrong():
    item = next(item for i in range(99) if len((item := item_of(EDIT[0], 5, i, 128)).facts.kept) == 2)
    edit = item.facts
    other = next(colour for colour in COLOURS if colour not in [thing.colour for thing in edit.after.things])
    spoiled = edit.after.with_thing(edit.kept[0][1], colour=other)
    verdict = judge_edit(edit, render(spoiled).image)
    assert verdict.changed
    assert not verdict.stayed
    assert 10 < verdict.psnr_db < 40


def test_an_added_thing_may_stand_where_it_likes():
    edit = next(
        edit
        for i in range(99)
        if not (edit := item_of(EDIT[0], 5, i, 128).facts).changes[0].value and len(edit.before.things) == 1
    )
    new, old = edit.after.things[-1], edit.after.things[0]
    elsewhere = edit.after.with_thing(1, x=-0.6 if old.x > 0 else 0.6, z=0.5)
    assert abs(elsewhere.things[1].x - new.x) + abs(elsewhere.things[1].z - new.z) > 0.1
    assert judge_edit(edit, render(elsewhere).image).success
    wrong = next(colour for colour in COLOURS if colour != new.colour)
    assert not judge_edit(edit, render(elsewhere.with_thing(1, colour=wrong)).image).changed


def test_psnr():
    a, where = np.full((4, 4, 3), 100, np.uint8), np.eye(4, dtype=bool)
    b = a.copy()
    b[where] = 110
    assert psnr(a, b, where) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(a, b, ~where) == 99.0


# Perception


@pytest.mark.parametrize("column", PERCEIVE, ids=lambda column: column.kind)
def test_maps(column):
    for index in range(3):
        item = item_of(column, 5, index, 128)
        assert score_map(item.facts, item.pictures[1])[0] == pytest.approx(1, abs=1e-6)
        assert score_map(item.facts, NOISE)[0] < 0.65  # within 2 pixels of noise there is always an edge
        assert score_map(item.facts, item.pictures[0])[0] < 0.65  # a photo has some of its map's edges
        soft = cv2.GaussianBlur(item.pictures[1], (0, 0), 0.6)
        assert score_map(item.facts, soft)[0] > 0.6


def test_edge_f1_by_hand():
    true, found = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    true[5], found[7, :10] = True, True  # two pixels off, half as long
    assert edge_f1(true, found, 2) == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert edge_f1(true, found, 1) == 0
    assert edge_f1(true, np.zeros_like(true), 2) == 0


def test_depth_and_normal_errors_by_hand():
    scene = Scene(things=(BALL,))
    item = dataclasses.replace(item_of(PERCEIVE[1], 0, 0, 128).facts, scene=scene)
    drawn = render(scene)
    far = dataclasses.replace(drawn, depth=drawn.depth * 1.1)
    score, measures = score_map(item, perception.draw(far, "depth"))
    assert measures["abs rel"] == pytest.approx(0.1, abs=0.01)
    assert score == 0
    turned = np.stack([drawn.normal[..., 0], -drawn.normal[..., 2], drawn.normal[..., 1]], -1)  # by 90 degrees about x
    item = dataclasses.replace(item, task="normal")
    _, measures = score_map(item, perception.draw(dataclasses.replace(drawn, normal=turned), "normal"))
    cosine = (drawn.normal * turned).sum(-1)[drawn.ids > 0]
    assert measures["degrees"] == pytest.approx(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean(), abs=1)


def test_joints_are_found_where_they_went():
    scene = Scene(things=(Thing(shape="doll", colour="red", size="large", z=0.2),))
    drawn = render(scene)
    shown = perception.draw(drawn, "pose")
    joint = drawn.joints[0][0, :2]
    assert joint_error(shown, shown, joint) == 0
    assert joint_error(shown, np.roll(shown, (3, 4), (0, 1)), joint) == 5
    assert joint_error(shown, np.zeros_like(shown), joint) == 16


def test_frames_that_cross_are_found():
    boxes = [(10, 10, 60, 50), (40, 30, 90, 80), (75, 10, 110, 40)]
    mask = np.zeros((128, 128), bool)
    for left, top, right, bottom in boxes:
        frame = np.zeros_like(mask)
        frame[top : bottom + 1, left : right + 1] = True
        frame[top + 2 : bottom - 1, left + 2 : right - 1] = False
        mask |= frame
    found = read_boxes(mask, 2)
    assert sorted(found) == sorted(boxes)
    assert read_boxes(np.zeros((128, 128), bool), 2) == []


def test_boxes_by_hand():
    assert box_iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert matched([(0, 0, 9, 9), (20, 0, 29, 9)], [(0, 0, 9, 9)]) == [1.0, 0.0]


# Words


def test_normalised_answers():
    for same in ("Red.", "a red", "it's red", "the RED"):
        assert is_right(same, "red")
    assert is_right("three", "3")
    assert is_right("三个", "3")
    assert is_right("红色的。", "红色")
    assert is_right("哑光的", "哑光的")
    assert not is_right("blue", "red")
    assert not is_right("", "red")
    assert not is_right("not red", "red")
    assert normalised("There are 3") == "3"


def test_a_conversation_ends_with_the_question():
    item = next(item for i in range(99) if question_index(item := item_of(COLUMNS[0], 0, i, 128)) > 0)
    turn = question_index(item)
    messages = conversation(item, turn)
    assert [message["role"] for message in messages] == ["user", "assistant"] * turn + ["user"]
    assert messages[-1]["content"][-1]["text"] == item.facts[turn].text
    assert messages[1]["content"] == item.facts[0].answer
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]


def test_routing():
    asks, draws = (next(item_of(COLUMNS[-1], 0, i, 128) for i in indices) for indices in ((0,), (1,)))
    assert (asks.task, draws.task) == ("understanding", "edit")
    judge = JUDGES["routing"]
    assert judge(asks, 0.1)["right"]
    assert not judge(asks, 0.9)["right"]
    assert judge(draws, 0.9)["right"]
    assert not judge(draws, 0.1)["right"]


# The table, and the command


def test_the_table_sums_up():
    verdicts = [Verdict(column=f"edit {kind}", index=i, score=float(right), right=right, measures={"psnr_db": dB})
                for kind, marks, dB in (("add", (1, 1, 0), 30.0), ("remove", (0, 0, 1), 12.0))
                for i, right in enumerate(map(bool, marks))]  # fmt: skip
    rows = {row.name: row for row in scenes_table.rows_of(verdicts)}
    assert rows["add"].value == pytest.approx(2 / 3)
    assert rows["add"].met
    assert rows["overall"].value == pytest.approx(0.5)
    assert rows["overall"].met
    assert rows["outside the mask"].value == pytest.approx(21)
    assert rows["remove"].measures == {"psnr_db": 12.0}


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*more):
        words = ["eval", "scenes", "-o", str(tmp_path / "out"), "--steps", "1", "--workers", "1", "--quiet", *more]
        monkeypatch.setattr("sys.argv", ["uniworld", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    page, names = tmp_path / "page.html", "understanding,t2i colors,edit add,perceive depth,routing"
    code, out, _ = run("--num", "2", "--columns", names, "--page", str(page))
    assert code == 0
    assert "Understanding" in out
    results = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["num"] for row in results["rows"] if row["unit"] == "share"] == [2, 2, 2, 2, 2]
    assert all(0 <= row["value"] <= 1 for row in results["rows"] if row["unit"] == "share")
    asked = json.loads((tmp_path / "out" / "run.json").read_text())
    own = drawing_defaults(read_config(tiny_dir()), tiny_dir())  # what no option names
    assert (asked["steps"], asked["edit_steps"], asked["guidance"]) == (1, 1, own["guidance_scale"])
    assert page.read_text().count("<article") == 10
    assert "<script" not in page.read_text()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "answers").rglob("*.*")}
    assert len(drawn) == 10
    gone = tmp_path / "out" / "answers" / "edit-add" / "000001.png"
    before = read_picture(gone).astype(int)
    gone.unlink()
    assert run("--num", "2", "--columns", names)[0] == 0
    assert np.abs(read_picture(gone) - before).max() <= 2  # alone in its batch now, which may round otherwise
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items() if path != gone)
    code, _, err = run("--num", "2", "--seed", "1")
    assert code == 2
    assert "holds answers for seed=0, not 1" in err
