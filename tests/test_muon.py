"""Muon: which weights it is for, its update, and runs that go on with it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from uniworld.config import OptimConfig
from uniworld.train import optim
from uniworld.train.optim import Muon, matrix_names, set_learning_rate

CONFIG = OptimConfig(name="muon", lr=1e-3, muon_lr=0.02)


class Words(nn.Module):
    """A network with every kind of weight."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.patches = nn.Conv2d(3, 8, 2)
        self.hidden = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8))
        self.lm_head = nn.Linear(8, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_for_linear_layers_but_those_over_the_vocabulary(tied):
    assert matrix_names(Words(tied)) == {"hidden.0.weight", "hidden.2.weight"}


def step(matrix, gradient, **settings):
    other = nn.Parameter(torch.zeros(3))
    matrix.grad, other.grad = gradient.clone(), torch.ones(3)
    Muon(replace(CONFIG, **settings), [matrix], [other]).step()
    return other


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("shape, scale", [((48, 48), 1.0), ((96, 24), 2.0), ((24, 96), 1.0)])
def test_the_update_is_the_gradients_nearest_orthogonal_matrix_nearly(shape, scale, emulated, monkeypatch):
    """Against the singular value decomposition in fp64: its vectors, values near 1, whatever the gradient's are."""
    monkeypatch.setattr(optim, "emulates_bf16", lambda device: emulated)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = nn.Parameter(torch.zeros(shape))
    other = step(matrix, 1e-4 * gradient)
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    found = u.T @ (-matrix.detach().double() / (0.02 * scale)) @ v.T
    values = found.diagonal()
    assert values.min() > 0.6 and values.max() < 1.25
    assert (found - values.diag()).abs().max() < (1e-4 if emulated else 0.1)  # without bf16 its vectors are exact
    assert other.detach() == pytest.approx(-1e-3 * torch.ones(3), rel=1e-4)  # AdamW's first step


def test_weight_decay_takes_as_much_off_as_adamws():
    matrix = nn.Parameter(torch.full((4, 4), 2.0))
    step(matrix, torch.zeros(4, 4), weight_decay=0.5)
    assert matrix.detach() == pytest.approx(torch.full((4, 4), 2.0 * (1 - 1e-3 * 0.5)), rel=1e-6)


def test_both_learning_rates_follow_one_schedule():
    optimizer = Muon(CONFIG, [nn.Parameter(torch.ones(2, 2))], [nn.Parameter(torch.ones(2))])
    set_learning_rate(optimizer, 5e-4, CONFIG)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.01), pytest.approx(5e-4)]
    set_learning_rate(optimizer, 1e-3, CONFIG)
    assert [part.param_groups[0]["lr"] for part in optimizer.parts.values()] == [pytest.approx(0.02), 1e-3]
