"""What words leave open is drawn in one way, which is as the words say."""

import dataclasses

import numpy as np
import pytest

from uniworld.data.scenes.descriptions import RELATIONS, Description
from uniworld.data.scenes.edits import edit_mask, make_edit
from uniworld.data.scenes.graph import COLOURS, SHAPES, column, gap, is_held_out, row
from uniworld.data.scenes.prompts import KIND_WEIGHTS, make_prompt
from uniworld.data.scenes.render import render
from uniworld.data.scenes.sampling import MIN_GAP, is_clear
from uniworld.data.scenes.tasks import make_item
from uniworld.data.scenes.typical import COLOUR_OF, SPOTS, TEXTURE, YAW, places, typical_scene, typical_thing
from uniworld.data.scenes.wording import wording


def prompts(kind: str, number: int, split: str = "train"):
    for seed in range(number):
        rng = np.random.default_rng(seed)
        language = ("en", "zh")[seed % 2]
        yield make_prompt(kind, rng, wording(language, rng), split, language)


@pytest.mark.parametrize("split", ["train", "held-out"])
@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_a_picture_for_a_prompt_is_as_it_says_and_clear(kind, split):
    for scene, prompt in prompts(kind, 20, split):
        assert prompt.holds(scene), (prompt, scene)
        assert is_clear(scene.things)


def test_what_a_prompt_leaves_open_is_always_the_same():
    by_words = {}
    for kind in ("single object", "two objects", "position"):
        for scene, prompt in prompts(kind, 120):
            said = (prompt.wants, prompt.relation, prompt.background, prompt.style)
            assert by_words.setdefault(said, scene) == scene
    assert len(by_words) < 300  # some are asked for twice


def test_only_captions_of_many_things_go_without_a_layout():
    for kind in KIND_WEIGHTS:
        found = [typical_scene(prompt) for _, prompt in prompts(kind, 40)]
        assert sum(scene is None for scene in found) <= (6 if kind == "caption" else 0)


def test_nothing_that_is_typical_is_held_out():
    assert set(COLOUR_OF) == set(SHAPES) and set(COLOUR_OF.values()) <= set(COLOURS)
    assert not any(is_held_out(shape, colour) for shape, colour in COLOUR_OF.items())


def test_what_is_said_of_a_thing_is_kept_and_the_rest_is_usual():
    said = Description(shape="cone", material="metal", size="small")
    thing = typical_thing(said, size="large")
    assert said.fits(thing) and (thing.colour, thing.yaw) == (COLOUR_OF["cone"], YAW)
    with pytest.raises(ValueError, match="must name a shape"):
        typical_thing(Description(colour="red"))


def test_a_new_thing_stands_as_near_to_its_spot_as_there_is_room():
    checked = 0
    for seed in range(60):
        edit = make_edit("add", np.random.default_rng(seed))
        (change,), new, index = edit.changes, edit.after.things[-1], len(edit.before.things)
        assert (new.yaw, new.pose) == (YAW, ())
        assert all(gap(new, thing) >= 0 for thing in edit.before.things)
        if change.value in RELATIONS:
            continue
        checked += 1
        nearer = places(change.value)[: places(change.value).index((new.x, new.z))]
        for x, z in nearer:
            tried = edit.after.with_thing(index, x=x, z=z).things
            too_near = any(gap(tried[-1], thing) < MIN_GAP for thing in tried[:-1])
            assert too_near or not is_clear(tried)
    assert checked > 20


@pytest.mark.parametrize("side", ["left", "middle", "right", "front", "back"])
def test_places_of_a_side_are_on_that_side(side):
    assert places(side)[0] == SPOTS[side]
    things = [typical_thing(Description(shape="ball")) for _ in places(side)]
    placed = [dataclasses.replace(thing, x=x, z=z) for thing, (x, z) in zip(things, places(side))]
    assert all(side in (column(thing), row(thing)) for thing in placed)


def test_a_new_background_has_one_texture():
    textures = {make_item("edit", seed, kind="background").scenes[-1].seed for seed in range(12)}
    assert textures == {TEXTURE}


def test_the_picture_of_a_map_has_one_texture_and_that_of_a_picture_many():
    def seeds(kind):
        return {make_item("perceive", seed, kind=kind).scenes[-1].seed for seed in range(12)}

    assert seeds("draw depth") == {TEXTURE}
    assert len(seeds("perceive depth")) == 12


def test_a_typical_picture_is_no_empty_one():
    for scene, _ in prompts("counting", 6):
        empty = scene
        for _ in scene.things:
            empty = empty.without_thing(0)
        assert edit_mask(render(scene, 64).image, render(empty, 64).image).mean() > 0.02
