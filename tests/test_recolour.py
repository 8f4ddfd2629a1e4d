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
    GREYS,
    MIN_HUE_GAP,
    PALE_RATE,
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


@pytest.mark.parametrize("shape", SHAPES)
def test_no_picture_comes_near_a_colour_that_is_held_out_with_the_shape(shape):
    """Flat patches in every colour that the shape may have, as the only thing of their scene: vivid ones keep away from
    the held-out hues, pale ones from white and black; what such a colour is held out with is not learned as impossible.
    """
    held_out = [colour for colour in COLOURS if is_held_out(shape, colour)]
    hues, num_pale = set(), 0
    for colour, seed in itertools.product([colour for colour in HUES if colour not in held_out], range(60)):
        patch, scene = np.full((2, 2, 3), COLOURS[colour], np.uint8), Scene(things=(Thing(shape=shape, colour=colour),))
        new_patch, (unseen,) = recoloured(patch, scene, np.random.default_rng(seed))
        new = new_patch[0, 0].tolist()
        assert shape not in unseen
        hues.add(round(degrees(new) / 30) % 12)
        light = 0.299 * new[0] + 0.587 * new[1] + 0.114 * new[2]
        rng = np.random.default_rng(seed)
        rng.uniform()  # brightness
        if rng.random() < PALE_RATE:
            num_pale += 1
            assert max(new) - min(new) <= 0.36 * 255
            assert light < 0.75 * 255 or "white" not in held_out, (colour, new)
            assert light > 0.15 * 255 or "black" not in held_out, (colour, new)
            assert unseen in [set(), *({one for one in SHAPES if is_held_out(one, grey)} for grey in GREYS)]
            continue
        gaps = {other: abs((degrees(new) - degrees(COLOURS[other]) + 180) % 360 - 180) for other in HUES}
        near, not_far = ({other for other in HUES if gaps[other] < MIN_HUE_GAP + more} for more in (-8, 8))
        assert not near & set(held_out), (colour, new)
        assert {one for one in SHAPES for other in near if is_held_out(one, other)} <= unseen
        assert unseen <= {one for one in SHAPES for other in not_far if is_held_out(one, other)}
    assert len(hues) >= 9 and 200 < num_pale < 400  # of twelve hues, and of some 500 pictures


def test_edges_stay_where_they_are():
    """What had one colour has one; all seeds give another picture, of which some are grey."""
    scene = Scene(things=(Thing(shape="cone", colour="purple"), Thing(shape="doll", colour="red", x=0.6)))
    picture = render(scene, 64).image
    seen = [recoloured(picture, scene, np.random.default_rng(seed))[0] for seed in range(20)]
    assert all(new.shape == picture.shape and new.dtype == np.uint8 for new in seen)
    assert len({new.tobytes() for new in seen}) == 20
    assert 1 <= sum((new == new[..., :1]).all() for new in seen) <= 8
    _, which = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
    for new in seen:
        first = np.zeros((which.max() + 1, 3), np.uint8)
        first[which] = new.reshape(-1, 3)
        assert np.array_equal(first[which], new.reshape(-1, 3))
    again, _ = recoloured(picture, scene, np.random.default_rng(3))
    assert np.array_equal(again, seen[3])


def test_hues_stay_where_none_is_far_enough_from_what_is_held_out(monkeypatch):
    """A shape that is held out in yellow, in orange near it: it is shown as it is, and not learned as impossible."""
    monkeypatch.setattr(recolour, "TRIES", 0)
    shape = next(shape for shape in SHAPES if is_held_out(shape, "yellow"))
    scene = Scene(things=(Thing(shape=shape, colour="orange"),))
    patch = np.full((2, 2, 3), COLOURS["orange"], np.uint8)
    for seed in range(20):
        new, (unseen,) = recoloured(patch, scene, np.random.default_rng(seed))
        assert abs(degrees(new[0, 0].tolist()) - degrees(COLOURS["orange"])) < 8
        assert new.max() - new.min() > 0.36 * 255 and shape not in unseen


def test_labels_are_of_every_point_and_role():
    """A white thing stays white: the shape that is held out in white is not shown so."""
    white = next(shape for shape in SHAPES if is_held_out(shape, "white"))
    scene = Scene(things=(Thing(shape="cone", colour="white", x=-0.5), Thing(shape="doll", colour="red", x=0.6)))
    picture = render(scene, 64).image
    colours = (recoloured(picture, scene, np.random.default_rng(seed)) for seed in range(20))
    unseen = next(unseen for new, unseen in colours if not (new == new[..., :1]).all())
    assert unseen[0] == {white}
    points, ids = unseen_at_points([scene], [unseen], 16)[0].numpy(), render(scene, 16).ids
    for n, name in enumerate(SHAPES, 1):
        assert (points[..., n] == np.isin(ids, [i + 1 for i in (0, 1) if name in unseen[i]])).all()
    assert not points[..., 0].any()
    about = (Description(shape="cone"), Description(shape="doll"))
    roles = unseen_of_roles([(scene, Question(kind="is_bigger", text="?", answer="no", about=about))], [unseen])
    assert [{SHAPES[i] for i in row.nonzero()[:, 0] - 1} for row in roles[0]] == [unseen[0], unseen[1], set()]
