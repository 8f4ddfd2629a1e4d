"""What vision towers, the base DiT and its text encoders learn from the scene graph."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from uniworld.data.scenes.graph import COLOURS, SHAPES, is_held_out
from uniworld.data.scenes.render import render
from uniworld.data.scenes.tasks import make_item
from uniworld.train.parts import dense


def test_what_is_seen_is_read_point_by_point():
    """Against the renderer's own pixels: the thing at every point, token by token, and what the whole picture is."""
    items = [make_item("understanding", seed, size_px=64) for seed in (0, 3)]
    labels = dense.dense_labels([item.scenes[0] for item in items], 16)
    assert labels["points"].shape == (2, 16, 16, 4) and labels["whole"].shape == (2, 3)
    for item, points, whole, surface in zip(items, labels["points"], labels["whole"], labels["surface"]):
        scene = item.scenes[0]
        ids = render(scene, 16).ids
        for y, x in np.ndindex(16, 16):
            thing = scene.things[ids[y, x] - 1] if ids[y, x] else None
            names = [None if thing is None else getattr(thing, name) for name in dense.OF_A_THING]
            assert [([None] + list(of))[n] for of, n in zip(dense.OF_A_THING.values(), points[y, x])] == names
        rendered = render(scene, 16)
        assert np.array_equal(surface[..., :3], rendered.normal)
        assert np.allclose(surface[..., 3] * dense.DEPTH_SPREAD + dense.MIDDLE_DEPTH, rendered.depth, atol=1e-4)
        assert [of[n] for of, n in zip(dense.OF_A_SCENE.values(), whole)] == [
            scene.background,
            scene.light,
            scene.style,
        ]
    by_token = dense.DenseHead(8, 4).by_token(labels["points"])
    assert by_token.shape == (2, 16, 16, 4)  # 4 x 4 tokens, each of 4 x 4 points
    assert torch.equal(by_token[1, 6].view(4, 4, 4), labels["points"][1, 4:8, 8:12])  # row 1, column 2


def test_a_layer_that_knows_reads_everything_rightly():
    """States that hold the labels themselves: the loss goes to zero, and every share of right ones to 1."""
    scenes = [make_item("understanding", seed, size_px=64).scenes[0] for seed in range(3)]
    labels = dense.dense_labels(scenes, 4)
    torch.manual_seed(0)
    states, head = nn.Parameter(torch.randn(3, 4, 64)), dense.DenseHead(64, 2)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(head.norm.weight)
    first, _ = head(states, labels)
    log_choices = _log_choices(labels["points"])
    by_hand = np.mean([math.log(n) for n in dense.SCENE_CLASSES])
    for side, weight in ((labels["points"][..., 0] > 0, 1), (labels["points"][..., 0] == 0, dense.EMPTY_WEIGHT)):
        by_hand += weight * float(log_choices[side].mean())
    there, errors = labels["points"][..., 0] > 0, labels["surface"].square().sum(-1)
    by_hand += float(errors[there].mean() + dense.EMPTY_WEIGHT * errors[~there].mean())
    assert float(first.detach()) == pytest.approx(by_hand, rel=1e-5)
    optimizer = torch.optim.AdamW([states, *head.parameters()], lr=0.03)
    for _ in range(80):
        loss, right = head(states, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.05 * float(first.detach()) and right.pop("surface_error") < 0.1, right
    assert min(map(float, right.values())) == 1, right


def test_what_an_edit_changes_counts_as_much_as_all_together():
    """A head of zeros is wrong by log n at every point, n choices: changed points add it again, however many."""
    scenes = [make_item("edit", seed, size_px=64).scenes for seed in range(6)]
    before, labels = (dense.dense_labels([pair[n] for pair in scenes], 16) for n in (0, -1))
    changed = dense.changed_points(before["points"], labels["points"])
    for pair, mask in zip(scenes, changed):
        assert mask.numpy().sum() == (_names(pair[0]) != _names(pair[-1])).any(-1).sum()
    assert 0 < changed.sum() < changed.numel() / 2
    head = dense.DenseHead(8, 4, reads_surface=False)
    for parameter in (head.points.weight, head.points.bias):
        nn.init.zeros_(parameter)
    states = torch.randn(6, 16, 8)
    plain, _ = head(states, labels)
    more, right = head(states, labels | {"changed": changed})
    expected = float(_log_choices(labels["points"])[changed].mean())
    assert float((more - plain).detach()) == pytest.approx(expected, rel=1e-5)
    none = (labels["points"][..., 0][changed] == 0).float().mean()  # zeros read "nothing"
    assert float(right["shape_changed_right"]) == pytest.approx(float(none))
    same, right = head(states, labels | {"changed": torch.zeros_like(changed)})
    assert torch.equal(same, plain) and "shape_changed_right" not in right


def _log_choices(points):
    """[B, P, P]: the sum over OF_A_THING of log n, n classes or, of shapes and colours, those that training shows."""
    named = itertools.product(enumerate(SHAPES, 1), enumerate(COLOURS, 1))
    pairs = [(s, c) for (s, shape), (c, colour) in named if is_held_out(shape, colour)]
    sums = torch.full(points.shape[:3], sum(math.log(n) for n in dense.POINT_CLASSES), dtype=torch.float64)
    for place in np.ndindex(*sums.shape):
        shape, colour = points[place][:2].tolist()
        for own, other, n in ((0, colour, dense.POINT_CLASSES[0]), (1, shape, dense.POINT_CLASSES[1])):
            sums[place] += math.log(n - sum(pair[1 - own] == other for pair in pairs)) - math.log(n)
    return sums


def _names(scene):
    """[16, 16, 4] names of OF_A_THING at 16 x 16 points, from the renderer's own ids."""
    rows = [["-"] * 4, *([getattr(thing, name) for name in dense.OF_A_THING] for thing in scene.things)]
    return np.array(rows)[render(scene, 16).ids]


def test_in_colour_shapes_are_read_as_in_greys():
    """Against the sum over classes and points of things, in fp64; greys learn nothing of it, and every class counts."""
    torch.manual_seed(0)
    head, points = dense.DenseHead(24, 2), torch.randint(0, 3, (2, 4, 4, 4), dtype=torch.uint8)
    coloured, greys = torch.randn(2, 4, 24, requires_grad=True), torch.randn(2, 4, 24, requires_grad=True)
    loss = head.agreement(coloured, greys, points)
    weight, bias = head.points.weight.detach().double(), head.points.bias.detach().double()
    expected, number = 0.0, 0
    for b, t, cell in itertools.product(range(2), range(4), range(4)):
        row, column = 2 * (t // 2) + cell // 2, 2 * (t % 2) + cell % 2
        if points[b, row, column, 0] == dense.NOTHING:
            continue
        rows = slice(cell * sum(dense.POINT_CLASSES), cell * sum(dense.POINT_CLASSES) + 1 + len(SHAPES))
        states = (side.detach()[b, t].double() for side in (coloured, greys))
        states = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in states)
        seen, wanted = ((weight[rows] @ x + bias[rows]).softmax(0) for x in states)
        expected, number = expected - float(wanted @ seen.log()), number + 1
    assert number > 10 and float(loss.detach()) == pytest.approx(expected / number, rel=1e-5)
    loss.backward()
    assert greys.grad is None and coloured.grad.abs().sum() > 0
    assert float(head.agreement(coloured, greys, torch.zeros_like(points)).detach()) == 0


def test_a_place_is_read_from_what_tells_it():
    head = dense.PlaceHead(9, 9)
    for parameter in head.place.parameters():
        nn.init.zeros_(parameter)
    loss, _ = head(torch.randn(2, 9, 9))
    assert loss.item() == pytest.approx(math.log(9), rel=1e-5)
    head.place.weight.data.copy_(20 * torch.eye(9))
    states = torch.eye(9).repeat(2, 1, 1)
    loss, right = head(states)
    assert loss.item() < 1e-3 and right == 1
    assert head(states.roll(1, 1))[1] == 0


def test_what_a_text_speaks_of_is_counted():
    scenes = [make_item("understanding", seed, size_px=64).scenes[0] for seed in range(12)]
    for scene, row in zip(scenes, dense.said_labels(scenes)):
        for number, count in enumerate(row.tolist()):
            shape, colour = SHAPES[number // len(COLOURS)], tuple(COLOURS)[number % len(COLOURS)]
            there = sum((thing.shape, thing.colour) == (shape, colour) for thing in scene.things)
            assert count == min(there, dense.MAX_SAID)
    said, background = dense.said_labels(scenes), torch.arange(12) % 9
    head, states = dense.SaidHead(32), nn.Parameter(torch.randn(12, 5, 32))
    optimizer = torch.optim.AdamW([states, *head.parameters()], lr=0.05)
    for _ in range(80):
        loss, found = head(states, said, background)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.5 and float(found) == 1
