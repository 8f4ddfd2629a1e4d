"""Pictures in other colours show shapes as they are, and no pair of shape and colour that is held out."""

import colorsys
import itertools

import numpy as np
import pytest

from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import COLOURS, SHAPES, Scene, Thing, is_held_out
from uniworld.data.scenes.questions import Question
from uniworld.data.scenes.render import render
from uniworld.train.parts import recolour
from uniworld.train.parts.recolour import (
    BLACKISH,
    GREYS,
    MIDDLE,
    MIN_HUE_GAP,
    NO_HUE,
    PALE_RATE,
    WHITISH,
    greyed,
    hue_of,
    recoloured,
    unseen_at_points,
    unseen_of_roles,
)

HUES = [colour for colour in COLOURS if colour not in GREYS]


def degrees(rgb) -> float:
    return 360 * colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0]


def test_hues_are_those_of_the_colours():
    for colour in HUES:
        assert hue_of(colour) == pytest.approx(degrees(COLOURS[colour]), abs=0.01)


def patch_of(thing: Thing) -> tuple[np.ndarray, Scene, np.ndarray]:
    """A picture that has the thing's colour all over, its scene, and where the thing is in it."""
    scene = Scene(things=(thing,))
    return np.full((16, 16, 3), COLOURS[thing.colour], np.uint8), scene, render(scene, 16).ids == 1


def luminance(rgb) -> float:
    return (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_no_picture_comes_near_a_colour_that_is_held_out_with_the_shape(shape):
    """Flat things in every colour that the shape may have: vivid ones keep away from the held-out hues, those without a
    hue from white and black; what such a colour is held out with is not learned as impossible."""
    held_out = [colour for colour in COLOURS if is_held_out(shape, colour)]
    hues, num_pale = set(), 0
    for colour, seed in itertools.product([colour for colour in COLOURS if colour not in held_out], range(40)):
        patch, scene, there = patch_of(Thing(shape=shape, colour=colour, size="large", z=0.2))
        new_patch, (unseen,) = recoloured(patch, scene, np.random.default_rng(seed))
        assert len(np.unique(new_patch[there], axis=0)) == 1
        new = new_patch[there][0].tolist()
        light = luminance(new)
        assert shape not in unseen
        rng = np.random.default_rng(seed)
        rng.uniform()  # brightness
        if rng.random() < PALE_RATE or colour in GREYS:
            num_pale += 1
            assert max(new) - min(new) <= 0.36 * 255
            assert light < WHITISH + 0.02 or "white" not in held_out, (colour, new)
            assert light > BLACKISH - 0.02 or "black" not in held_out, (colour, new)
            assert unseen in [set(), *({one for one in SHAPES if is_held_out(one, grey)} for grey in GREYS)]
            continue
        hues.add(round(degrees(new) / 30) % 12)
        gaps = {other: abs((degrees(new) - degrees(COLOURS[other]) + 180) % 360 - 180) for other in HUES}
        near, not_far = ({other for other in HUES if gaps[other] < MIN_HUE_GAP + more} for more in (-8, 8))
        assert not near & set(held_out), (colour, new)
        assert light > NO_HUE - 0.02 or "black" not in held_out, (colour, new)
        assert {one for one in SHAPES for other in near if is_held_out(one, other)} <= unseen
        dark = {"black"} if light < NO_HUE + 0.02 else set()
        assert unseen <= {one for one in SHAPES for other in not_far | dark if is_held_out(one, other)}
    assert len(hues) >= 9 and 60 < num_pale < 250  # of twelve hues, and of some 340 pictures


def test_every_thing_has_a_colour_of_its_own_and_edges_stay():
    """What had one colour in one thing has one; all seeds give another picture, of which some are grey."""
    scene = Scene(things=(Thing(shape="cone", colour="purple", x=-0.5), Thing(shape="doll", colour="purple", x=0.6)))
    picture, ids = render(scene, 64).image, render(scene, 64).ids
    seen = [recoloured(picture, scene, np.random.default_rng(seed))[0] for seed in range(30)]
    assert all(new.shape == picture.shape and new.dtype == np.uint8 for new in seen)
    assert len({new.tobytes() for new in seen}) == 30
    assert 1 <= sum((new == new[..., :1]).all() for new in seen) <= 8
    before = np.concatenate([picture, ids[..., None]], 2).reshape(-1, 4)
    _, which = np.unique(before, axis=0, return_inverse=True)
    for new in seen:
        first = np.zeros((which.max() + 1, 3), np.uint8)
        first[which] = new.reshape(-1, 3)
        assert np.array_equal(first[which], new.reshape(-1, 3))
    means = np.array([[new[ids == i].mean(0) for i in (1, 2)] for new in seen])
    apart = np.abs(means[:, 0] - means[:, 1]).max(-1)  # of two purple things: other hues, or in greys other brightness
    assert (apart > 20).sum() > 20
    again, _ = recoloured(picture, scene, np.random.default_rng(3))
    assert np.array_equal(again, seen[3])


def test_hues_stay_where_none_is_far_enough_from_what_is_held_out(monkeypatch):
    """A shape that is held out in yellow, in orange near it: its hue is kept, and it is not learned as impossible."""
    monkeypatch.setattr(recolour, "TRIES", 0)
    shape = next(shape for shape in SHAPES if is_held_out(shape, "yellow"))
    patch, scene, there = patch_of(Thing(shape=shape, colour="orange", size="large", z=0.2))
    num_vivid = 0
    for seed in range(20):
        new_patch, (unseen,) = recoloured(patch, scene, np.random.default_rng(seed))
        new = new_patch[there][0].tolist()
        assert shape not in unseen and 0.3 < luminance(new) < 0.6
        if max(new) - min(new) > 0.36 * 255:
            num_vivid += 1
            assert abs(degrees(new) - degrees(COLOURS["orange"])) < 8
    assert num_vivid > 5


def test_in_greys_no_thing_has_a_colour():
    """Nor may one be taken for white or black; they keep their edges, and differ in brightness from seed to seed."""
    for colour in COLOURS:
        patch, scene, there = patch_of(Thing(shape="cube", colour=colour, size="large", z=0.2))
        lights = []
        for seed in range(20):
            new = greyed(patch, scene, np.random.default_rng(seed))
            assert new.dtype == np.uint8 and (new == new[..., :1]).all() and len(np.unique(new[there])) == 1
            lights.append(float(new[there][0, 0]) / 255)
        assert MIDDLE[0] - 0.02 < min(lights) < 0.4 and 0.5 < max(lights) < MIDDLE[1] + 0.02, colour


def test_labels_are_of_every_point_and_role():
    """A white thing may stay white: the shape that is held out in white is then not shown so."""
    white = next(shape for shape in SHAPES if is_held_out(shape, "white"))
    scene = Scene(things=(Thing(shape="cone", colour="white", x=-0.5), Thing(shape="doll", colour="red", x=0.6)))
    picture = render(scene, 64).image
    colours = (recoloured(picture, scene, np.random.default_rng(seed))[1] for seed in range(40))
    unseen = next(unseen for unseen in colours if unseen[0] == {white} and unseen[1])
    points, ids = unseen_at_points([scene], [unseen], 16)[0].numpy(), render(scene, 16).ids
    for n, name in enumerate(SHAPES, 1):
        assert (points[..., n] == np.isin(ids, [i + 1 for i in (0, 1) if name in unseen[i]])).all()
    assert not points[..., 0].any()
    about = (Description(shape="cone"), Description(shape="doll"))
    roles = unseen_of_roles([(scene, Question(kind="is_bigger", text="?", answer="no", about=about))], [unseen])
    assert [{SHAPES[i] for i in row.nonzero()[:, 0] - 1} for row in roles[0]] == [unseen[0], unseen[1], set()]
