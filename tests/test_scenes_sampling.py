"""Random scenes, footprints, the held-out rule and relations."""

import math

import numpy as np
import pytest
from scene_shapes import FLOOR_X, FLOOR_Z, is_inside

from uniworld.data.scenes import backdrops, solids
from uniworld.data.scenes.graph import (
    COLOURS,
    POSES,
    SHAPES,
    SIZE_RADIUS,
    SPLITS,
    Scene,
    Thing,
    footprint_radius,
    has_held_out,
    is_held_out,
    left_of,
    pose_name,
)
from uniworld.data.scenes.render import geometry, render, visible_shares
from uniworld.data.scenes.sampling import NoRoomError, arrange, sample_scene


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_sampled_things_stand_apart_and_can_be_seen(split):
    rng = np.random.default_rng(1)
    counts = set()
    for _ in range(25):
        scene = sample_scene(rng, split=split)
        counts.add(len(scene.things))
        assert has_held_out(scene) == (split == "held-out")
        assert scene.seed % 2 == (split == "held-out")
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                apart = math.hypot((a.x - b.x) * FLOOR_X, (a.z - b.z) * FLOOR_Z)
                assert apart > footprint_radius(a) + footprint_radius(b)
        ids = render(scene, 128).ids
        for i, thing in enumerate(scene.things):
            alone = (geometry(solids.tables(Scene(things=(thing,))), 128)[0] == 1).sum()
            assert (ids == i + 1).sum() >= 0.6 * alone > 0
    assert min(counts) == 1 and max(counts) == 5


def test_no_texture_of_a_held_out_backdrop_is_in_training():
    rng = np.random.default_rng(2)
    seeds = {split: [sample_scene(rng, split=split, num_things=1).seed for _ in range(100)] for split in SPLITS}
    textures = {split: {backdrops.texture_of(seed) for seed in seeds[split]} for split in SPLITS}
    assert not textures["train"] & textures["held-out"]
    assert len(textures["train"]) > 25 and len(textures["held-out"]) == 2
    pictures = {backdrops.backdrop("meadow", texture, 32).albedo.tobytes() for texture in textures["train"]}
    assert len(pictures) == len(textures["train"])  # none of them looks like another


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "doll"])
def test_nothing_of_a_thing_reaches_beyond_its_footprint(shape):
    thing = Thing(shape=shape, colour="red", size="large", x=0.3, yaw=25.0)
    angle, share = np.meshgrid(np.linspace(0, 2 * np.pi, 181), [1.0, 1.1, 1.3])
    radius, (x, z) = share * footprint_radius(thing), thing.place
    for y in np.linspace(0.01, 2.2, 60):
        points = np.stack([x + radius * np.cos(angle), np.full_like(angle, y), z + radius * np.sin(angle)], -1)
        assert not is_inside(thing, points).any()
    assert footprint_radius(thing) < 1.3 * SIZE_RADIUS["large"]


def test_nothing_of_a_doll_reaches_beyond_its_footprint():
    for pose in POSES.values():
        thing = Thing(shape="doll", colour="red", size="medium", pose=pose)
        rows = solids.tables(Scene(things=(thing,))).solids
        extent = np.sqrt(((rows[:, solids.AXES].reshape(-1, 3, 3) * rows[:, solids.DIMS][:, :, None]) ** 2).sum(1))
        reach = np.abs(rows[:, 2] - thing.place[0]) + extent[:, 0]
        assert reach.max() <= footprint_radius(thing) + 1e-9
        assert (rows[:, 3] - extent[:, 1]).min() == pytest.approx(0, abs=1e-9)  # it stands on the floor


def test_the_held_out_pairs():
    pairs = {(s, c) for s in SHAPES for c in COLOURS if is_held_out(s, c)}
    assert len(pairs) == 10
    assert {s for s, _ in pairs} == set(SHAPES) and {c for _, c in pairs} == set(COLOURS)
    assert all(any(not is_held_out(s, c) for c in COLOURS) for s in SHAPES)
    assert not is_held_out("ball", "red") and is_held_out("cube", "red")


def test_seeds_repeat_and_what_is_given_is_kept():
    again = [sample_scene(np.random.default_rng(9), background="snow", num_things=3) for _ in range(2)]
    assert again[0] == again[1] and again[0].background == "snow" and len(again[0].things) == 3
    balls = [Thing(shape="ball", colour="red", size="small")] * 4
    scene = sample_scene(np.random.default_rng(2), things=balls)
    assert [t.shape for t in scene.things] == ["ball"] * 4 and len({t.x for t in scene.things}) == 4
    with pytest.raises(NoRoomError, match="no room for 40 beside 0 others"):
        arrange(np.random.default_rng(0), [Thing(shape="cube", colour="red", size="large")] * 40)
    with pytest.raises(ValueError, match="split='test': must be one of train, held-out"):
        sample_scene(np.random.default_rng(0), split="test")


def test_relations_and_poses():
    a, b = Thing(shape="ball", colour="red", x=-0.5), Thing(shape="cube", colour="blue", x=0.5)
    assert left_of(a, b) and not left_of(b, a)
    assert all(pose_name(pose) == name for name, pose in POSES.items())
    assert visible_shares(Scene(things=(a, b))).tolist() == [1.0, 1.0]
