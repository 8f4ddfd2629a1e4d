"""The reader: from a picture to the scene that it shows, by drawing scenes until one is like it.

It starts from the empty backdrop most like the picture, then adds one thing after the other: outlines are laid over
the pixels that are not explained yet, the best are drawn with shadow and light, and the one that explains most is
fitted in place, turn, size and surface. A thing counts if it explains enough of the picture, and most of where it is.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes.graph import COLOURS, LIGHTS, MATERIALS, POSES, SHAPES, SIZES, Scene, gap
from uniworld.data.scenes.render import picture_of, render
from uniworld.eval import scenes_search
from uniworld.eval.scenes_compare import MOST, difference, fitted, lab

SIZE_PX, FIT_PX = 128, 64
MAX_THINGS = 8
# Colour difference that a thing must explain, summed over FIT_PX pixels: so much, or less where it leaves little.
MIN_GAIN, LEAST_GAIN, LEAST_SHARE = 160.0, 50.0, 0.45
MAX_OVERLAP = 0.12  # of footprints, world units
MAX_UNEXPLAINED = 14.0  # mean colour difference left where the thing is
ROUNDS = 2  # of fitting everything again
EXCELLENT = 1.5  # mean colour difference of a thing that is left as it is
GOOD = 4.0  # mean colour difference of a thing that needs no second look
ROUND = ("ball", "cylinder", "cone")
TURNS = (-36.0, -18.0, 0.0, 18.0, 36.0)  # degrees
STEPS = ((0.12, 0.12, 20.0), (0.06, 0.06, 10.0), (0.03, 0.03, 5.0))  # of x, z and yaw, coarse to fine
LAST_STEPS = ((0.015, 0.015, 3.0), (0.008, 0.008, 2.0))


@dataclass(frozen=True)
class Effort:
    """Of a search: how many candidates are drawn, how many of them may be alike, how many shapes are fitted and how
    often each, and whether it is for what hardly stands out."""

    num_candidates: int
    alike: int
    num_shapes: int
    num_each: int
    faint: bool = False


QUICK, THOROUGH, FAINT = Effort(40, 3, 4, 1), Effort(150, 8, 7, 2), Effort(60, 3, 4, 1, faint=True)


@dataclass(frozen=True)
class FoundScene:
    """What was found in a picture.

    scene: the things, backdrop and light. errors: of each thing, the mean colour difference where it is. error: of the
    whole picture.
    """

    scene: Scene
    errors: tuple[float, ...]
    error: float


def read_scene(picture: np.ndarray) -> FoundScene:
    """The scene that a picture shows, uint8 [H, W, 3] of any size, in the style of a photo."""
    picture = fitted(picture, SIZE_PX)
    backdrops = scenes_search.best_backdrops(picture)
    if not backdrops:
        return FoundScene(Scene(things=()), (), MOST)
    fits = [_Fit(picture, scene) for scene in backdrops]
    for fit in fits:
        fit.add()  # what the first thing looks like tells where the light comes from
    fit = min(fits, key=lambda fit: fit.error)
    fit.add_all()
    fit.add_all(FAINT)
    for _ in range(ROUNDS):
        fit.polish()
        if not fit.replace_poor():
            break
    fit.settle()
    return fit.found()


class _Fit:
    """A picture and the scene found so far."""

    def __init__(self, picture: np.ndarray, scene: Scene):
        self.picture, self.scene = picture, scene
        self.seen = lab(fitted(picture, FIT_PX))
        self._errors_of: dict[Scene, float] = {}  # of all that were drawn: more than a quarter come again
        self.error = self.error_of(scene)

    def error_of(self, scene: Scene) -> float:
        """Colour difference to the picture, summed over FIT_PX pixels."""
        if scene not in self._errors_of:
            self._errors_of[scene] = float(difference(self.seen, lab(picture_of(scene, FIT_PX))).sum())
        return self._errors_of[scene]

    def add_all(self, effort: Effort = QUICK) -> None:
        while len(self.scene.things) < MAX_THINGS and self.add(effort):
            pass

    def add(self, effort: Effort = QUICK) -> bool:
        """Add the thing that explains most; False where none explains enough."""
        drawn = picture_of(self.scene, SIZE_PX)
        tried = []
        for thing in scenes_search.candidates(self.picture, drawn, effort.num_candidates, effort.alike, effort.faint):
            if all(gap(thing, other) >= -MAX_OVERLAP for other in self.scene.things):
                tried.append((self.error_of(self.scene.plus(thing)), thing))
        by_shape: dict[str, list] = {}
        for _, thing in sorted(tried, key=lambda pair: pair[0]):
            by_shape.setdefault(thing.shape, []).append(thing)
        index = len(self.scene.things)
        starts = [
            thing for things in list(by_shape.values())[: effort.num_shapes] for thing in things[: effort.num_each]
        ]
        if not starts:
            return False
        fitted_ones = [self.fit(self.scene.plus(thing), index) for thing in starts]
        error, scene = self._relight(*min(fitted_ones, key=lambda pair: pair[0]))
        if not self._explains(scene, index):
            return False
        self.error, self.scene = error, scene
        return True

    def _explains(self, scene: Scene, index: int) -> bool:
        """Whether a thing makes a scene enough like the picture to be really there."""
        drawn, without = render(scene, FIT_PX), render(scene.without_thing(index), FIT_PX)
        left, gained = difference(self.seen, lab(drawn.image)), difference(self.seen, lab(without.image))
        gain, there = float(gained.sum() - left.sum()), drawn.ids == index + 1
        little_left = left[there].sum() <= LEAST_SHARE * gained[there].sum()
        return bool(gain >= MIN_GAIN or (gain >= LEAST_GAIN and there.any() and little_left))

    def _relight(self, error: float, scene: Scene) -> tuple[float, Scene]:
        """The backdrop shows the light by its colour only; things show where it comes from."""
        lit = [dataclasses.replace(scene, light=light) for light in LIGHTS]
        return min([(error, scene), *((self.error_of(other), other) for other in lit)], key=lambda pair: pair[0])

    def fit(self, scene: Scene, index: int) -> tuple[float, Scene]:
        """One thing of a scene fitted to the picture: surface, size, place and turn."""
        best = self._turn(scene, index)
        for step in STEPS:
            best = self._choose(*best, index, "material", MATERIALS)
            best = self._walk(*best, index, step)
            best = self._choose(*best, index, "size", SIZES)
            if scene.things[index].shape == "doll":
                best = self._choose(*best, index, "pose", tuple(POSES.values()))
        return self._choose(*best, index, "colour", tuple(COLOURS))

    def _turn(self, scene: Scene, index: int) -> tuple[float, Scene]:
        """The turn that fits best: small steps from a wrong one may not lead there."""
        best = self.error_of(scene), scene
        return best if scene.things[index].shape in ROUND else self._choose(*best, index, "yaw", TURNS)

    def _choose(self, error: float, scene: Scene, index: int, field: str, values) -> tuple[float, Scene]:
        for value in values:
            if value != getattr(scene.things[index], field):
                changed = scene.with_thing(index, **{field: value})
                if (now := self.error_of(changed)) < error:
                    error, scene = now, changed
        return error, scene

    def _walk(self, error: float, scene: Scene, index: int, step: tuple[float, float, float]) -> tuple[float, Scene]:
        limits = {"x": (-1.0, 1.0), "z": (0.0, 1.0), "yaw": (-45.0, 45.0)}
        for (field, (low, high)), width in zip(limits.items(), step):
            if field == "yaw" and scene.things[index].shape in ROUND:
                continue
            for way in (width, -width):
                moved = False
                for _ in range(4):
                    value = getattr(scene.things[index], field) + way
                    if not low <= value <= high:
                        break
                    changed = scene.with_thing(index, **{field: value})
                    now = self.error_of(changed)
                    if now >= error:
                        break
                    error, scene, moved = now, changed, True
                if moved:
                    break
        return error, scene

    def polish(self) -> None:
        """Fit every thing again beside the others, and drop what explains nothing any more."""
        blurred = self._everywhere()
        for index, error in enumerate(self._errors(self.scene)):
            if error < EXCELLENT + blurred:
                continue
            for shape in SHAPES:
                thing = self.scene.things[index]
                if shape != thing.shape:
                    pose = POSES["standing"] if shape == "doll" else ()
                    changed = self.scene.with_thing(index, shape=shape, pose=pose)
                    if self._turn(changed, index)[0] < 1.15 * self.error + 60:
                        error, changed = self.fit(changed, index)
                        if error < self.error:
                            self.error, self.scene = error, changed
            self.error, self.scene = self.fit(self.scene, index)

    def settle(self) -> None:
        """The last small steps of every thing: relations hang on them."""
        for index in range(len(self.scene.things)):
            for step in LAST_STEPS:
                self.error, self.scene = self._walk(self.error, self.scene, index, step)

    def replace_poor(self) -> bool:
        """Take away the things that are not much like the picture, and look again what may be there."""
        errors, good = self._errors(self.scene), GOOD + self._everywhere()
        if max(errors, default=0) <= good:
            return False
        before = self.error, self.scene
        kept = tuple(thing for thing, error in zip(self.scene.things, errors) if error <= good)
        self.scene = dataclasses.replace(self.scene, things=kept)
        self.error = self.error_of(self.scene)
        self.add_all(THOROUGH)
        if self.error < before[0]:
            return True
        self.error, self.scene = before
        return False

    def _everywhere(self) -> float:
        """The colour difference of the whole picture: what a model draws is not sharp, or a little off in tone."""
        return float(np.median(difference(self.seen, lab(picture_of(self.scene, FIT_PX)))))

    def _errors(self, scene: Scene) -> list[float]:
        """The mean colour difference where each thing is; infinite for one that does not show."""
        drawn = render(scene, FIT_PX)
        unlike = difference(self.seen, lab(drawn.image))
        where = [drawn.ids == index + 1 for index in range(len(scene.things))]
        return [float(unlike[there].mean()) if there.any() else np.inf for there in where]

    def found(self) -> FoundScene:
        """The scene without things that are not really there."""
        kept, errors = [], []
        for index, error in enumerate(self._errors(self.scene)):
            if error <= MAX_UNEXPLAINED and self._explains(self.scene, index):
                kept.append(self.scene.things[index])
                errors.append(error)
        scene = dataclasses.replace(self.scene, things=tuple(kept))
        return FoundScene(scene, tuple(errors), self.error / FIT_PX**2)
