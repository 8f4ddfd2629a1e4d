"""Where things may be in a picture: the backdrop it shows, and outlines laid over pixels of one colour."""

import dataclasses
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from uniworld.data.scenes import solids
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    PLAIN,
    POSES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)
from uniworld.data.scenes.render import geometry, picture_of, render
from uniworld.data.scenes.sampling import in_picture
from uniworld.eval.scenes_compare import BACKDROP_SEEDS, difference, fitted, lab

COUNTED = 0.6  # of the pixels, those most like a backdrop: the others may show things
MOST_UNLIKE = 15.0  # mean colour difference of a picture to its backdrop; beyond, it shows none
COARSE_PX = 48  # of outlines
BACKDROP_PX = 32
CELLS = 32  # of each channel, in the table of colours
X_PLACES, Z_PLACES = np.linspace(-1, 1, 19), np.linspace(0, 1, 9)
TURNS = {"cube": (0.0, 44.0), "pyramid": (0.0, 44.0), "torus": (-28.0, 0.0, 28.0)}  # degrees; others: 0
SHADE = 0.3, 1.02  # of a shadow's brightness, as a share of what lies in it
TINT = 0.08  # how far the channels of a shadow may part


@dataclass(frozen=True)
class Outlines:
    """Things alone, and for each a row of weights that is high where pixels of its colour fill its outline."""

    things: tuple[Thing, ...]
    weights: np.ndarray
    """float32 [N, COARSE_PX ** 2]: 2 inside, -1 in a ring around."""
    areas: np.ndarray
    """float32 [N]: pixels inside."""


def best_backdrops(picture: np.ndarray) -> list[Scene]:
    """The empty scene that is most like a picture, by the pixels that are most like it.

    Several where only the direction of the light parts them, which a backdrop does not show; none where no backdrop is
    anything like the picture.
    """
    scenes, pictures = _backdrops()
    errors = np.sort(np.linalg.norm(pictures - _small(picture), axis=-1), axis=1)
    errors = errors[:, : int(COUNTED * errors.shape[1])].mean(1)
    best = scenes[int(errors.argmin())]
    if errors.min() > MOST_UNLIKE:
        return []
    alike = zip(scenes, errors <= errors.min() + 0.25)
    return [s for s, near in alike if near and (s.background, s.seed) == (best.background, best.seed)]


@cache
def _backdrops() -> tuple[list[Scene], np.ndarray]:
    """All empty scenes, and what they look like: float32 [N, BACKDROP_PX ** 2, 3]."""
    scenes = [
        Scene(things=(), background=background, light=light, seed=seed)
        for background in BACKGROUNDS
        for light in LIGHTS
        for seed in BACKDROP_SEEDS
    ]
    scenes.append(Scene(things=(), background=PLAIN))
    return scenes, np.stack([_small(picture_of(scene, 128)) for scene in scenes])


def _small(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(fitted(picture, BACKDROP_PX).astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)


def candidates(picture: np.ndarray, drawn: np.ndarray, number: int, alike: int, faint: bool) -> list[Thing]:
    """Things that may explain where a picture is unlike what was drawn so far, the likeliest first.

    Args:
        picture, drawn: uint8 [H, W, 3].
        number: how many; alike: at most so many of one shape and colour.
        faint: look for what hardly stands out, such as white on snow.
    """
    outlines = _outlines()
    picture, drawn = fitted(picture, COARSE_PX), fitted(drawn, COARSE_PX)
    likely = _colour_likelihoods(picture) * _unexplained(picture, drawn, faint)[..., None]
    by_colour = outlines.weights @ likely.reshape(-1, len(COLOURS))
    # All colours together as well: the pattern of a thing may look like other colours.
    likely_any = likely.sum(-1).ravel()
    scores = np.concatenate([by_colour, (outlines.weights @ likely_any)[:, None]], 1) - outlines.areas[:, None]
    first = by_colour.argmax(1)
    order = np.argsort(-scores, axis=None)
    found, counts = [], {}
    for flat in order[:4000]:
        index, colour = divmod(int(flat), len(COLOURS) + 1)
        thing = outlines.things[index]
        colour = int(first[index]) if colour == len(COLOURS) else colour
        key = thing.shape, colour
        if counts.get(key, 0) < alike:
            counts[key] = counts.get(key, 0) + 1
            found.append(dataclasses.replace(thing, colour=list(COLOURS)[colour]))
        if len(found) == number:
            break
    return found


def _unexplained(picture: np.ndarray, drawn: np.ndarray, faint: bool) -> np.ndarray:
    """From 0 to 1, how unlike what was drawn each pixel is; less where it may be that in a shadow."""
    unlike = difference(lab(picture), lab(drawn))
    if faint:
        return np.clip((unlike - 1) / 3, 0, 1)
    unlike = np.clip((unlike - 3) / 8, 0, 1)
    ratio = (solids.linear(picture) + 0.01) / (solids.linear(drawn) + 0.01)
    mean = ratio.mean(-1)
    shade = (mean > SHADE[0]) & (mean < SHADE[1]) & (np.ptp(ratio, axis=-1) < TINT)
    return (unlike * np.where(shade, 0.5, 1)).astype(np.float32)


def _colour_likelihoods(picture: np.ndarray) -> np.ndarray:
    """float32 [H, W, colours]: how likely each colour is at a pixel that shows a thing; they add up to at most 1."""
    cells = picture // (256 // CELLS)
    return _colour_table()[cells[..., 0], cells[..., 1], cells[..., 2]]


@cache
def _colour_table() -> np.ndarray:
    """float32 [CELLS, CELLS, CELLS, colours], counted in pictures of things in every material and light."""
    counts = np.zeros((CELLS, CELLS, CELLS, len(COLOURS)), np.float32)
    for number, colour in enumerate(COLOURS):
        for material in MATERIALS:
            for light in LIGHTS:
                places = zip(("ball", "cube", "cone"), (-0.6, 0.0, 0.6))
                look = {"colour": colour, "material": material, "size": "large", "z": 0.4}
                things = tuple(Thing(shape=shape, x=x, **look) for shape, x in places)
                drawn = render(Scene(things=things, light=light), 64)
                cells = drawn.image[drawn.ids > 0] // (256 // CELLS)
                np.add.at(counts[..., number], tuple(cells.T), 1)
    for number in range(len(COLOURS)):
        counts[..., number] = _blurred(counts[..., number])
    return counts / (counts.sum(-1, keepdims=True) + 0.02)


def _blurred(table: np.ndarray) -> np.ndarray:
    """Colours near each other share their counts."""
    kernel = cv2.getGaussianKernel(7, 1.2).ravel()
    for axis in range(3):
        padded = np.pad(table, [(3, 3) if i == axis else (0, 0) for i in range(3)])
        parts = [np.take(padded, range(i, i + CELLS), axis) for i in range(len(kernel))]
        table = sum(weight * part for weight, part in zip(kernel, parts))
    return table


@cache
def _outlines() -> Outlines:
    kept, weights, areas = [], [], []
    for thing in _places():
        ids = geometry(solids.tables(Scene(things=(thing,))), COARSE_PX)[0]
        inside = ids.astype(np.float32)
        around = cv2.dilate(ids, np.ones((5, 5), np.uint8)).astype(np.float32) - inside
        kept.append(thing)
        weights.append((2 * inside - around).ravel())
        areas.append(inside.sum())
    return Outlines(tuple(kept), np.stack(weights), np.array(areas, np.float32))


def _places() -> list[Thing]:
    things = [
        Thing(shape=shape, colour="red", size=size, x=float(x), z=float(z), yaw=yaw, pose=pose)
        for shape in SHAPES
        for size in SIZES
        for yaw in TURNS.get(shape, (0.0,))
        for pose in (POSES.values() if shape == "doll" else ((),))
        for x in X_PLACES
        for z in Z_PLACES
    ]
    return [thing for thing in things if in_picture(thing)]
