"""Pictures in other colours, from which shapes are learned whatever their colour.

Ten pairs of shape and colour are held out. A vision tower that sees no blue cylinder has no need to look at what tells
one from a blue cube, and does not: after 22,000 steps it read the shapes of 95 % of things, and of 46 % of those whose
pair is held out. Turning hues and taking colour away, as all contrastive learning does (Chen et al., 2020, SimCLR,
section 3.2), makes it look. No picture shows a held-out pair: what comes near its colour is not
drawn.
"""

import cv2
import numpy as np

from uniworld.data.scenes.graph import COLOURS, Scene, is_held_out

GREY_RATE = 0.25  # of pictures, how many lose their colours
SATURATION, GAMMA = (0.4, 1.2), (0.7, 1.4)
MIN_HUE_GAP = 25.0  # degrees between a thing's hue and that of the colour that is held out with its shape
TRIES = 20
GREYS = ("white", "black")  # colours without a hue


def recoloured(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of the scene, uint8 [H, W, 3], with hues turned, paler or richer, darker or lighter; or in greys."""
    light = (255 * (np.arange(256) / 255) ** rng.uniform(*GAMMA)).round().astype(np.uint8)
    if rng.random() < GREY_RATE and not any(is_held_out(thing.shape, grey) for thing in scene.things for grey in GREYS):
        return np.repeat(light[cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)][..., None], 3, axis=2)
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL))
    hue = hue + np.uint8(_hue_shift(scene, rng) / 360 * 256)  # around the circle, as 8 bits are
    saturation = (saturation * rng.uniform(*SATURATION)).clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.merge([hue, saturation, light[value]]), cv2.COLOR_HSV2RGB_FULL)


def _hue_shift(scene: Scene, rng: np.random.Generator) -> float:
    """Degrees, 0 to 360, by which all hues turn so that no thing comes near a colour that is held out with its shape;
    0 where nothing else was found."""
    coloured = [thing for thing in scene.things if thing.colour not in GREYS]
    pairs = [(thing.colour, c) for thing in coloured for c in COLOURS if c not in GREYS and is_held_out(thing.shape, c)]
    for shift in rng.uniform(0, 360, TRIES):
        gaps = [abs((hue_of(own) + shift - hue_of(held_out) + 180) % 360 - 180) for own, held_out in pairs]
        if min(gaps, default=180) >= MIN_HUE_GAP:
            return float(shift)
    return 0.0


def hue_of(colour: str) -> float:
    """Degrees."""
    rgb = np.array([[COLOURS[colour]]], np.float32)
    return float(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[0, 0, 0])
