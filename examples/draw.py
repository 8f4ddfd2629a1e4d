"""Draws the example scenes beside this file: python examples/draw.py"""

from pathlib import Path

from PIL import Image

from uniworld.data.scenes.graph import POSES, Scene, Thing
from uniworld.data.scenes.render import render

SIZE_PX = 256

SCENES = {
    "scene": Scene(
        things=(
            Thing(shape="ball", colour="red", material="glossy", x=-0.55, z=0.35),
            Thing(shape="cube", colour="yellow", x=0.1, z=0.75, yaw=30, size="large"),
            Thing(shape="cone", colour="green", x=0.6, z=0.3),
        ),
        background="wood table",
    ),
    "beach": Scene(
        things=(
            Thing(shape="ball", colour="orange", material="striped", x=-0.2, z=0.3, size="large"),
            Thing(shape="torus", colour="cyan", x=0.6, z=0.55),
        ),
        background="beach",
        light="warm",
    ),
    "snow": Scene(
        things=(
            Thing(shape="pyramid", colour="blue", x=-0.5, z=0.5, yaw=20, size="large"),
            Thing(shape="cylinder", colour="red", x=0.4, z=0.4),
        ),
        background="snow",
        light="cool",
    ),
    "night": Scene(
        things=(
            Thing(shape="ball", colour="yellow", material="metal", x=0.3, z=0.5, size="large"),
            Thing(shape="cone", colour="purple", x=-0.5, z=0.3),
        ),
        background="night",
    ),
    "meadow": Scene(
        things=(
            Thing(shape="cube", colour="white", material="dotted", x=-0.45, z=0.4, yaw=15),
            Thing(shape="cube", colour="pink", x=0.1, z=0.8, yaw=40),
            Thing(shape="ball", colour="black", x=0.6, z=0.3, material="glossy"),
        ),
        background="meadow",
        light="right",
    ),
    "desert": Scene(
        things=(
            Thing(shape="cylinder", colour="green", material="glossy", x=0.0, z=0.35, size="large"),
            Thing(shape="pyramid", colour="orange", x=-0.65, z=0.7, yaw=30),
        ),
        background="desert",
    ),
    "tiles": Scene(
        things=(
            Thing(shape="torus", colour="red", material="glossy", x=-0.4, z=0.4, size="large"),
            Thing(shape="torus", colour="blue", x=0.5, z=0.6),
        ),
        background="tiles",
        light="front",
    ),
    "studio": Scene(
        things=(Thing(shape="cone", colour="cyan", material="striped", x=0.0, z=0.4, size="large"),),
        background="studio",
    ),
    "doll": Scene(
        things=(
            Thing(shape="doll", colour="orange", x=-0.1, z=0.35, size="large", pose=POSES["standing"]),
            Thing(shape="ball", colour="blue", x=0.6, z=0.5),
        ),
        background="studio",
        light="warm",
    ),
    "three_balls": Scene(
        things=(
            Thing(shape="ball", colour="red", x=-0.6, z=0.5),
            Thing(shape="ball", colour="green", x=0.0, z=0.3),
            Thing(shape="ball", colour="blue", x=0.6, z=0.5),
        ),
        background="tiles",
    ),
    "sketch": Scene(
        things=(
            Thing(shape="cube", colour="red", x=-0.4, z=0.4, yaw=25, size="large"),
            Thing(shape="cone", colour="blue", x=0.5, z=0.5),
        ),
        background="studio",
        style="pencil sketch",
    ),
    "watercolour": Scene(
        things=(
            Thing(shape="ball", colour="purple", x=-0.4, z=0.4, size="large"),
            Thing(shape="cylinder", colour="yellow", x=0.5, z=0.6),
        ),
        background="meadow",
        style="watercolour",
    ),
}

if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, scene in SCENES.items():
        Image.fromarray(render(scene, SIZE_PX).image).save(folder / f"{name}.png", optimize=True)
