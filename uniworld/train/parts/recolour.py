"""Pictures in other colours, from which shapes are learned whatever their colour.

Ten pairs of shape and colour are held out. A vision tower that sees no blue cylinder has no need to look at what tells
one from a blue cube, and does not: after 22,000 steps it read the shapes of 95 % of things, and of 46 % of those whose
pair is held out. Other hues and brightness for each thing and colour taken away, as all contrastive learning does (Chen
et al., 2020, SimCLR, section 3.2), make it look; and in colour it must find what it finds in greys (`agreement` in
`dense`). No picture shows a held-out pair: what comes near its colour is not drawn, or so pale that it is a tint of
grey.
"""

import colorsys
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from uniworld.data.scenes.graph import COLOURS, SHAPES, Scene, Thing, is_held_out
from uniworld.data.scenes.questions import Question
from uniworld.train.parts.dense import geometry_at
from uniworld.train.parts.grounding import ROLES, things_of

PALE_RATE = 0.3  # of pictures, how many lose their colours, all of them or nearly
PALE, VIVID, GAMMA = (-0.1, 0.35), (0.4, 1.2), (0.75, 1.33)  # shares of the colour left, and exponents of brightness
DARKER, BRIGHTER = (0.5, 1.5), (1.0, 4.5)  # by what a thing's brightness may be multiplied, and that of a black one
MIN_HUE_GAP = 25.0  # degrees between a thing's hue and that of the colour that is held out with its shape
WHITISH, BLACKISH = 0.65, 0.25  # luminances from which a pale thing may be taken for white, up to which for black
NO_HUE = 0.15  # luminance up to which any thing may be taken for black
MIDDLE = (0.28, 0.62)  # luminances of things in greys, between black and white
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as in cv2
TRIES = 20
GREYS = ("white", "black")  # colours without a hue
UnseenShapes = tuple[frozenset[str], ...]  # of every thing of a scene


class Look(NamedTuple):
    """How a thing is shown: by what its hue turns, degrees, and its brightness is multiplied."""

    shift: float = 0.0
    gain: float = 1.0


def recoloured(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, UnseenShapes]:
    """A picture of the scene, uint8 [H, H, 3], with hues and brightness of each thing and of what is behind changed,
    paler or richer, or in greys; and of every thing the shapes that are never shown as it is coloured now, which are
    not to be learned as impossible."""
    gamma, pale = rng.uniform(*GAMMA), rng.random() < PALE_RATE
    looks, unseen = [Look(shift=rng.uniform(0, 360))], []
    for thing in scene.things:
        look, held_out = _new_look(thing, rng, gamma, pale)
        looks.append(look)
        unseen.append(held_out - {thing.shape})
    shifts, gains = np.array(looks)[geometry_at(scene, len(picture))[0]].transpose(2, 0, 1)
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL))
    hue = hue + (shifts / 360 * 256).astype(np.int64).astype(np.uint8)  # around the circle, as 8 bits are
    value = _bytes(255 * gains * (value / 255) ** gamma)
    turned = cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB_FULL).astype(np.float32)
    grey = cv2.cvtColor(turned, cv2.COLOR_RGB2GRAY)[..., None]
    return _bytes(grey + max(rng.uniform(*(PALE if pale else VIVID)), 0) * (turned - grey)), tuple(unseen)


def greyed(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of the scene, uint8 [H, H, 3], in greys, every thing of a middling brightness of its own: of no colour
    that has a name."""
    gamma, gains = rng.uniform(*GAMMA), [1.0]
    for thing in scene.things:
        luminance = float(LUMINANCE @ COLOURS[thing.colour]) / 255
        gains.append(rng.uniform(*MIDDLE) / luminance**gamma)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) / 255
    light = _bytes(255 * np.array(gains)[geometry_at(scene, len(picture))[0]] * grey**gamma)
    return np.repeat(light[..., None], 3, axis=2)


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


def _new_look(thing: Thing, rng: np.random.Generator, gamma: float, pale: bool) -> tuple[Look, frozenset[str]]:
    """One in which the thing comes near no colour that is held out with its shape, and the shapes that are held out
    with those it comes near; where none was found, its own hue at a middling brightness."""
    gains = np.log(BRIGHTER if thing.colour == "black" else DARKER)
    for _ in range(TRIES):
        look = Look(rng.uniform(0, 360), float(np.exp(rng.uniform(*gains))))
        held_out = _held_out_with(_near(thing.colour, look, gamma, pale))
        if thing.shape not in held_out:
            return look, held_out
    look = Look(gain=float(np.mean(MIDDLE)) / _shown(thing.colour, Look(), gamma)[1])
    return look, _held_out_with(_near(thing.colour, look, gamma, pale))


def _shown(colour: str, look: Look, gamma: float) -> tuple[float, float]:
    """Hue, degrees, and luminance, 0 to 1, of a thing of this colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[colour]))
    hue = (hue + look.shift / 360) % 1
    return 360 * hue, float(LUMINANCE @ colorsys.hsv_to_rgb(hue, saturation, min(look.gain * value**gamma, 1)))


def _near(colour: str, look: Look, gamma: float, pale: bool) -> list[str]:
    """The colours for which a thing of this one may be taken."""
    hue, luminance = _shown(colour, look, gamma)
    without_hue = pale or colour in GREYS
    near = ["black"] if luminance <= (BLACKISH if without_hue else NO_HUE) else []
    if without_hue:
        return near + ["white"] if luminance >= WHITISH else near
    hues = {other: hue_of(other) for other in COLOURS if other not in GREYS}
    return near + [other for other, at in hues.items() if abs((hue - at + 180) % 360 - 180) < MIN_HUE_GAP]


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def _held_out_with(colours: Collection[str]) -> frozenset[str]:
    """The shapes that are held out in one of these colours."""
    return frozenset(shape for shape in SHAPES for colour in colours if is_held_out(shape, colour))


@lru_cache(maxsize=len(COLOURS))
def hue_of(colour: str) -> float:
    """Degrees."""
    return 360 * colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[colour]))[0]
