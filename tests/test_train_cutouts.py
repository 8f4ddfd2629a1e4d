"""What the semantic encoder learns of where things end, against pixels of the renderer."""

import numpy as np
import pytest
import torch

from uniworld.data.scenes.render import render
from uniworld.data.scenes.tasks import make_item
from uniworld.train.parts import cutouts


@pytest.fixture
def scenes():
    scenes = [make_item("understanding", seed, size_px=64).scenes[0] for seed in range(3)]
    assert any(scene.style == "photo" for scene in scenes)
    return scenes


def test_cover_counts_the_pixels_of_things(scenes):
    """Of a patch of 16 pixels, drawn four times as large: a cell of 2 pixels has 8 x 8 of the larger picture, every
    second of which is a sample, so that shares agree but for edges."""
    labels = cutouts.cover_labels(scenes, 8)
    assert labels.shape == (3, 64, 64) and labels.dtype == torch.uint8
    for scene, cover in zip(scenes, labels):
        ids = render(scene, 512).ids > 0
        for y, x in np.ndindex(8, 8):
            cells = ids[64 * y : 64 * (y + 1), 64 * x : 64 * (x + 1)].reshape(8, 8, 8, 8).mean((1, 3))
            found = cover[8 * y + x].view(8, 8) / 16
            assert np.abs(found.numpy() - cells).max() <= 0.2
            assert abs(float(found.mean()) - cells.mean()) < 0.02


def test_things_alone_look_as_they_did_and_all_else_is_white(scenes):
    """Of photos; what shines on things from floor and wall is another, so that colours differ a little."""
    for scene in (scene for scene in scenes if scene.style == "photo"):
        picture, before = cutouts.alone(scene, 128), render(scene, 128).image
        fine = render(scene, 512).ids.reshape(128, 4, 128, 4)
        empty, full = (fine == 0).all((1, 3)), (fine > 0).all((1, 3))
        assert (picture[empty] == 255).all()
        difference = np.abs(picture.astype(int) - before)
        assert difference[full].mean() < 0.3 * difference[empty].mean()


def test_edges_count_most_and_what_is_known_costs_nothing():
    """The loss by hand of layers that say zero: a patch of each kind, with other errors in each."""
    head = cutouts.CutoutHead(6, 4)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    latents, cover = torch.zeros(1, 3, 4), torch.zeros(1, 3, 64, dtype=torch.uint8)
    latents[0, 0], latents[0, 1], latents[0, 2] = 1, 2, 3
    cover[0, 1], cover[0, 2, :32] = 16, 16  # no thing, all thing, half of it
    loss, read = head(torch.randn(1, 3, 6), latents, cover)
    by_hand = (0.15 * (20 * 1 + 10 * 0) + 1 * (20 * 4 + 10 * 1) + 3 * (20 * 9 + 10 * 0.5)) / 4.15
    assert float(loss.detach()) == pytest.approx(by_hand, rel=1e-6)
    assert float(read["alone_error"]) == 9 and float(read["cover_error"]) == 0.5
    with torch.no_grad():
        head.latents.weight[:, 0], head.cover.weight[:, 1] = 1, 1
    known = torch.zeros(1, 2, 6)
    known[0, 0, 0], known[0, 1, 1] = 3, 1
    alone, covered = torch.zeros(1, 2, 4), torch.zeros(1, 2, 64, dtype=torch.uint8)
    alone[0, 0], covered[0, 1] = 3, 16
    assert float(head(known, alone, covered)[0].detach()) == 0
