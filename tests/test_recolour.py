"""Pictures in other colours show shapes as they are, and no pair of shape and colour that is held out."""

import colorsys

import cv2
import numpy as np
import pytest

from uniworld.data.scenes.graph import COLOURS, SHAPES, Scene, Thing, is_held_out
from uniworld.data.scenes.render import render
from uniworld.train.parts.recolour import GREYS, MIN_HUE_GAP, hue_of, recoloured

HUES = [colour for colour in COLOURS if colour not in GREYS]


def degrees(rgb) -> float:
    return 360 * colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0]


def test_hues_are_those_of_the_colours():
    for colour in HUES:
        assert hue_of(colour) == pytest.approx(degrees(COLOURS[colour]), abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_hue_comes_near_one_that_is_held_out_with_the_shape(shape):
    """Flat patches in every colour that the shape may have, as the only thing of their scene."""
    held_out = [colour for colour in COLOURS if is_held_out(shape, colour)]
    turned = set()
    for colour in [colour for colour in HUES if colour not in held_out]:
        patch, scene = np.full((2, 2, 3), COLOURS[colour], np.uint8), Scene(things=(Thing(shape=shape, colour=colour),))
        for seed in range(60):
            new = recoloured(patch, scene, np.random.default_rng(seed))[0, 0].tolist()
            if max(new) - min(new) < 8:
                assert not set(held_out) & set(GREYS), (shape, colour, new)
                continue
            for other in set(held_out) & set(HUES):
                gap = abs((degrees(new) - degrees(COLOURS[other]) + 180) % 360 - 180)
                assert gap > MIN_HUE_GAP - 8, (shape, colour, new)  # 8-bit pictures hold hues of pale ones coarsely
            turned.add(round(degrees(new) / 30) % 12)
    assert len(turned) >= 9  # of twelve hues


def test_edges_stay_where_they_are():
    """A grey picture is the luminance, lighter or darker in all of it alike; all differ from one seed to another."""
    scene = Scene(things=(Thing(shape="cone", colour="purple"), Thing(shape="doll", colour="red", x=0.6)))
    picture = render(scene, 64).image
    seen = [recoloured(picture, scene, np.random.default_rng(seed)) for seed in range(20)]
    assert all(new.shape == picture.shape and new.dtype == np.uint8 for new in seen)
    assert len({new.tobytes() for new in seen}) == 20
    grey = [new for new in seen if (new == new[..., :1]).all()]
    assert 2 <= len(grey) <= 9
    light = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    for new in grey:
        order = np.argsort(light.ravel(), kind="stable")
        assert (np.diff(new[..., 0].ravel()[order].astype(int)) >= 0).all()
    again = recoloured(picture, scene, np.random.default_rng(3))
    assert np.array_equal(again, seen[3])
