"""Pictures in other colours, from which shapes are learned whatever their colour.

Ten pairs of shape and colour are held out. A vision tower that sees no blue cylinder has no need to look at what tells
one from a blue cube, and does not: after 22,000 steps it read the shapes of 95 % of things, and of 46 % of those whose
pair is held out. Turning hues and taking colour away, as all contrastive learning does (Chen et al., 2020, SimCLR,
section 3.2), makes it look. No picture shows a held-out pair: what comes near its colour is not drawn, or so pale that
it is a tinted grey.
"""

import colorsys
from collections.abc import Collection, Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from uniworld.data.scenes.graph import COLOURS, SHAPES, Scene, is_held_out
from uniworld.data.scenes.questions import Question
from uniworld.train.parts.dense import geometry_at
from uniworld.train.parts.grounding import ROLES, things_of

PALE_RATE = 0.6  # of pictures, how many lose their colours, all of them or nearly
PALE, VIVID, GAMMA = (-0.1, 0.35), (0.4, 1.2), (0.8, 1.25)  # shares of the colour left, and exponents of brightness
MIN_HUE_GAP = 25.0  # degrees between a thing's hue and that of the colour that is held out with its shape
WHITISH, BLACKISH = 0.65, 0.25  # luminances from which a pale thing may be taken for white, up to which for black
TRIES = 20
GREYS = ("white", "black")  # colours without a hue
UnseenShapes = tuple[frozenset[str], ...]  # of every thing of a scene


def recoloured(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, UnseenShapes]:
    """A picture of the scene, uint8 [H, W, 3], with hues turned, paler or richer, darker or lighter, or in greys; and
    of every thing the shapes that are never shown as it is coloured now, which are not to be learned as impossible."""
    light = (255 * (np.arange(256) / 255) ** rng.uniform(*GAMMA)).round().astype(np.uint8)
    pale = rng.random() < PALE_RATE
    shift = _hue_shift(scene, rng, pale)
    if shift is None:
        pale, shift = False, 0.0  # hues that are shown anyway
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL))
    hue = hue + np.uint8(shift / 360 * 256)  # around the circle, as 8 bits are
    turned = cv2.cvtColor(cv2.merge([hue, saturation, light[value]]), cv2.COLOR_HSV2RGB_FULL).astype(np.float32)
    grey = cv2.cvtColor(turned, cv2.COLOR_RGB2GRAY)[..., None]
    new = grey + max(rng.uniform(*(PALE if pale else VIVID)), 0) * (turned - grey)
    unseen = tuple(_held_out_with(_near(thing.colour, shift, pale)) - {thing.shape} for thing in scene.things)
    return new.round().clip(0, 255).astype(np.uint8), unseen


def unseen_at_points(scenes: Sequence[Scene], unseen: Sequence[UnseenShapes], num_points: int) -> Tensor:
    """bool [B, P, P, 1 + shapes], P = num_points: of what every point shows the classes that are never shown so."""
    at_points = [_classes(of)[geometry_at(scene, num_points)[0]] for scene, of in zip(scenes, unseen)]
    return torch.from_numpy(np.stack(at_points))


def unseen_of_roles(pairs: Sequence[tuple[Scene, Question]], unseen: Sequence[UnseenShapes]) -> Tensor:
    """bool [N, R, 1 + shapes]: as in `unseen_at_points`, of the one thing that plays each role of a question."""
    found = np.zeros((len(pairs), len(ROLES), 1 + len(SHAPES)), bool)
    for row, ((scene, question), of) in enumerate(zip(pairs, unseen)):
        for role, things in enumerate(things_of(question, scene)):
            if len(things) == 1:
                found[row, role] = _classes(of)[1 + things[0]]
    return torch.from_numpy(found)


def _classes(unseen: UnseenShapes) -> np.ndarray:
    """bool [1 + things, 1 + shapes], first of nothing."""
    return np.array([[False] * (1 + len(SHAPES)), *([False, *(s in shapes for s in SHAPES)] for shapes in unseen)])


def _hue_shift(scene: Scene, rng: np.random.Generator, pale: bool) -> float | None:
    """Degrees, 0 to 360, by which all hues turn so that no thing comes near a colour that is held out with its shape;
    None where nothing was found."""
    for shift in rng.uniform(0, 360, TRIES):
        if not any(thing.shape in _held_out_with(_near(thing.colour, shift, pale)) for thing in scene.things):
            return float(shift)
    return None


def _near(colour: str, shift: float, pale: bool) -> list[str]:
    """The colours for which this one may be taken when its hue is turned; white and black stay what they are."""
    if colour in GREYS:
        return [colour]
    turned = hue_of(colour) + shift
    if not pale:
        hues = {other: hue_of(other) for other in COLOURS if other not in GREYS}
        return [other for other, hue in hues.items() if abs((turned - hue + 180) % 360 - 180) < MIN_HUE_GAP]
    _, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[colour]))
    red, green, blue = colorsys.hsv_to_rgb(turned / 360 % 1, saturation, value)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    taken = {"white": luminance >= WHITISH, "black": luminance <= BLACKISH}
    return [grey for grey in GREYS if taken[grey]]


def _held_out_with(colours: Collection[str]) -> frozenset[str]:
    """The shapes that are held out in one of these colours."""
    return frozenset(shape for shape in SHAPES for colour in colours if is_held_out(shape, colour))


@lru_cache(maxsize=len(COLOURS))
def hue_of(colour: str) -> float:
    """Degrees."""
    return 360 * colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[colour]))[0]
