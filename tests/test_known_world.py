"""What a small model says of pictures that are not of its world."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from uniworld.checkpoint.tiny import write_random_tiny
from uniworld.engine import Engine
from uniworld.models.known_world import KnownWorld


def test_distances_are_those_of_mahalanobis():
    """Against NumPy in fp64; the limit is where it says."""
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(6, 6))
    states, others = (torch.from_numpy(rng.normal(size=(n, 4, 6)) @ shape + 3).float() for n in (400, 100))
    world = KnownWorld.of(states, others)
    means = states.double().mean(1).numpy()
    covariance = np.cov(means.T, bias=True)
    covariance += 1e-3 * np.trace(covariance) / 6 * np.eye(6)
    apart = others.double().mean(1).numpy() - means.mean(0)
    expected = np.sqrt(np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart))
    assert world.distances(others).numpy() == pytest.approx(expected, rel=1e-3)
    assert world.limit == pytest.approx(1.2 * np.quantile(expected, 0.99), rel=1e-3)


def test_it_comes_back_from_its_file(tmp_path):
    assert KnownWorld.load(tmp_path) is None
    world = KnownWorld(torch.randn(3), torch.eye(3), 2.5)
    world.save(tmp_path)
    again = KnownWorld.load(tmp_path)
    assert torch.equal(again.mean, world.mean) and again.limit == 2.5
    assert torch.equal(again.precision, world.precision)


def test_an_engine_names_the_picture_that_is_strange(tmp_path):
    """Greys are its world here: one more of them passes in silence, a colour is named, in chats too."""
    write_random_tiny(tmp_path / "tiny")
    engine = Engine.from_pretrained(str(tmp_path / "tiny"), progress=False)
    greys = [Image.new("RGB", (64, 64), (n, n, n)) for n in range(40, 200, 2)]
    encoder = engine.model.semantic_encoder
    states = encoder(encoder.preprocess(greys))
    KnownWorld.of(states[::2], states[1::2]).save(tmp_path / "tiny" / "siglip")
    engine = Engine.from_pretrained(str(tmp_path / "tiny"), progress=False)
    settings = {"num_inference_steps": 1, "height": 64, "width": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.edit(greys[7], "make it darker", **settings)
    red = Image.new("RGB", (64, 64), "red")
    with pytest.warns(UserWarning, match="^picture 2: is not like the scenes .*knows only its own world") as found:
        engine.edit([greys[7], red], "put both together", **settings)
    assert len(found) == 1 and found[0].filename.endswith("known_world.py")
    content = [{"type": "image", "image": red}, {"type": "text", "text": "what is this?"}]
    with pytest.warns(UserWarning, match="^picture 1: is not like"):
        engine.chat([{"role": "user", "content": content}], mode="text", max_new_tokens=1)
