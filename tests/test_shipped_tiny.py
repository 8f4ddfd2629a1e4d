"""The trained `tiny` in the package: small, the default, and as its README says."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniworld.checkpoint import tiny
from uniworld.data.scenes.captions import Prompt, Want
from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.edits import edit_mask
from uniworld.data.scenes.render import render
from uniworld.data.scenes.typical import typical_scene
from uniworld.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
SIZE_PX = 128


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("tiny", device="cpu", progress=False)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a - b).mean()))


def test_it_is_the_default_small_and_complete():
    assert tiny.tiny_dir() == tiny.PACKAGED
    files = [path for path in tiny.PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30_000_000
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    own = json.loads((tiny.PACKAGED / "config.json").read_text())["uniworld"]
    assert own["random_weights"] is False and own["anchor_px"] == SIZE_PX**2
    assert (tiny.PACKAGED / "README.md").is_file()


def test_the_first_line_of_the_readme_moves_the_scene_to_a_desert(engine, monkeypatch):
    """What is drawn is like the scene drawn in a desert, and much less like the scene that was given."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import draw

    wanted = levels(Image.fromarray(render(replace(draw.SCENES["beach"], background="desert"), 256).image))
    given = Image.open(ROOT / "examples" / "beach.png")
    drawn = levels(engine.edit(given, "put it in a desert", seed=1).images[0])
    assert psnr(drawn, wanted) > 26
    assert psnr(drawn, levels(given)) < psnr(wanted, levels(given)) + 0.2  # no nearer to it than the exact picture


def test_the_red_ball_becomes_blue_and_the_rest_stays(engine, monkeypatch):
    """Where the ball stands the picture is clearly nearer to a blue one; elsewhere it is at least 20 dB near."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import draw

    scene = draw.SCENES["scene"]
    assert (scene.things[0].colour, scene.things[0].shape) == ("red", "ball")
    given, wanted = (render(each, SIZE_PX).image for each in (scene, scene.with_thing(0, colour="blue")))
    where = edit_mask(given, wanted)
    drawn = levels(engine.edit(Image.open(ROOT / "examples" / "scene.png"), "make the red ball blue", seed=1).images[0])
    away, left = (np.abs(drawn - each)[where].mean() for each in (given, wanted))
    assert left < 0.6 * away, (left, away)
    assert psnr(drawn[~where], given[~where].astype(float)) > 20


def test_two_things_of_a_prompt_come_in_their_colours_side_by_side(engine):
    """The picture is near to the one that is meant, and far from the same with the colours exchanged."""
    ball, cube = (Description(shape=shape, colour=colour) for shape, colour in (("ball", "yellow"), ("cube", "blue")))
    wants = tuple(Want(description=description) for description in (ball, cube))
    prompt = Prompt(kind="attribute binding", language="en", text="a yellow ball and a blue cube", wants=wants)
    scene = typical_scene(prompt)
    exchanged = scene.with_thing(0, colour="blue").with_thing(1, colour="yellow")
    meant, other = (render(each, SIZE_PX).image for each in (scene, exchanged))
    drawn = levels(engine.generate(prompt.text, seed=1).images[0])
    where = edit_mask(meant, other)
    away, left = (np.abs(drawn - each)[where].mean() for each in (other, meant))
    assert left < 0.5 * away, (left, away)
    assert psnr(drawn, meant.astype(float)) > 20


def test_a_photograph_is_not_of_its_world_and_a_scene_is(engine):
    with pytest.warns(UserWarning, match="knows only its own world"):
        engine.edit(Image.open(ROOT / "examples" / "cat.jpg"), "make it snow", num_inference_steps=1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.edit(Image.open(ROOT / "examples" / "beach.png"), "make it snow", num_inference_steps=1, seed=0)


def test_it_tells_backgrounds_apart(engine):
    for name, word in (("beach", "beach"), ("snow", "snow"), ("desert", "desert")):
        content = [
            {"type": "image", "image": Image.open(ROOT / "examples" / f"{name}.png")},
            {"type": "text", "text": "what is the background?"},
        ]
        reply = engine.chat([{"role": "user", "content": content}], mode="text", max_new_tokens=16)
        assert word in reply.text.lower(), (name, reply.text)
