"""Perception both ways: from a picture to its map, and from a map with a caption to the picture."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from uniworld.data.scenes.captions import short_caption
from uniworld.data.scenes.descriptions import Description, describe
from uniworld.data.scenes.edits import with_doll
from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.perception import TASKS, draw
from uniworld.data.scenes.render import render
from uniworld.data.scenes.sampling import sample_scene
from uniworld.data.scenes.typical import TEXTURE
from uniworld.data.scenes.wording import Wording

POINTING = ("segment", "detect")  # tasks that are about certain things, drawn on the picture: no maps to start from
KIND_WEIGHTS = {f"perceive {task}": 2.0 for task in TASKS} | {
    f"draw {task}": 1.0 for task in TASKS if task not in POINTING
}
ALL_RATE = 0.2  # of pointing at things, at all of them
NUM_THINGS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Perception:
    """A perception item.

    way: "perceive" from the picture to the map, "draw" from the map to the picture. target: of segment and detect, the
    things meant, by index; empty means all. about: how the words describe them.
    """

    task: str
    way: str
    scene: Scene
    instruction: str
    target: tuple[int, ...] = ()
    about: Description | None = None

    def pictures(self, size_px: int) -> tuple[np.ndarray, np.ndarray]:
        """What is given and what is to be drawn, uint8 [H, W, 3]."""
        rendered = render(self.scene, size_px)
        pair = rendered.image, draw(rendered, self.task, self.target)
        return pair if self.way == "perceive" else pair[::-1]


def make_perception(kind: str, rng: np.random.Generator, words: Wording, split: str) -> Perception:
    """An item of one of KIND_WEIGHTS, of a fresh scene."""
    way, task = kind.split(" ", 1)
    number = int(rng.choice(NUM_THINGS))
    make = with_doll if task == "pose" else sample_scene
    while True:
        scene = make(rng, split=split, num_things=number)
        if way == "draw":  # no map shows the texture
            scene = dataclasses.replace(scene, seed=TEXTURE)
        if task not in POINTING:
            slots = {"caption": short_caption(scene, words, background=True)} if way == "draw" else {}
            instruction = words.sentence(words.fill(kind, **slots))
            return Perception(task=task, way=way, scene=scene, instruction=instruction)
        if words.chance(ALL_RATE):
            section = f"{kind} main" if number == 1 else f"{kind} all"
            instruction = words.sentence(words.fill(section))
            return Perception(task=task, way=way, scene=scene, instruction=instruction)
        index = words.pick(range(number))
        the = describe(scene, index, rng)
        if the is not None:
            instruction = words.sentence(words.fill(kind, the=words.the(the)))
            return Perception(task=task, way=way, scene=scene, instruction=instruction, target=(index,), about=the)
