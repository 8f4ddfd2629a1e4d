"""What every point of a picture shows, learned from the states of its tokens, so that a vision tower sees things.

Answers and captions say little a picture: a tower that has only them learns to see very slowly. SigLIP2 has a decoder
that tells what stands where (Wan et al., 2024, LocCa); here the scene graph does, and a linear layer on each token's
state reads it: of the thing at each of P x P points shape, colour, material and size; the surface's normal and depth
there, without which shapes are learned late; and of the whole picture background, light and style. The layer is thrown
away.

Ten pairs of shape and colour are held out. Who must tell the shape of every thing in training learns as well that a
blue one is never a cube: after 22,000 steps shapes were read rightly of 95 % of things, and of 46 % of those whose pair
is held out. So a class that training cannot show beside what else is there takes no part in the softmax (`only_seen`).

Letters: B pictures, T tokens, one for every p x p points, D width of a state, P points along a side.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.data.scenes import solids
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    PLAIN,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    is_held_out,
)
from uniworld.data.scenes.render import geometry

NOTHING, UNNAMED = 0, 255  # the classes of a point where no thing is, and of what has no name or does not show
OF_A_THING = {"shape": SHAPES, "colour": tuple(COLOURS), "material": MATERIALS, "size": SIZES}
OF_A_SCENE = {"background": (*BACKGROUNDS, PLAIN), "light": LIGHTS, "style": STYLES}
POINT_CLASSES = tuple(1 + len(names) for names in OF_A_THING.values())
SCENE_CLASSES = tuple(len(names) for names in OF_A_SCENE.values())
UNSEEN_PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS if is_held_out(shape, colour)]
EMPTY_WEIGHT = 0.5
MAX_SAID, RARELY = 3, -5.0  # a logit: most of the pairs are not there
MIDDLE_DEPTH, DEPTH_SPREAD = 9.2, 1.8  # world units: brings depths to about mean 0 and deviation 1


def dense_labels(scenes: Sequence[Scene], num_points: int) -> dict[str, Tensor]:
    """P = num_points.

    points uint8 [B, P, P, 4]: classes of OF_A_THING, NOTHING where the background shows. whole uint8 [B, 3]: of
    OF_A_SCENE. surface fp32 [B, P, P, 4]: the unit normal in camera space, and the depth, scaled.
    """
    points, surface = [], []
    for scene in scenes:
        ids, depth, normal, _ = geometry_at(scene, num_points)
        points.append(of_things(scene)[ids])
        surface.append(np.concatenate([normal, (depth[..., None] - MIDDLE_DEPTH) / DEPTH_SPREAD], -1))
    whole = [[names.index(getattr(scene, field)) for field, names in OF_A_SCENE.items()] for scene in scenes]
    return {
        "points": torch.from_numpy(np.stack(points)),
        "whole": torch.tensor(whole, dtype=torch.uint8),
        "surface": torch.from_numpy(np.stack(surface).astype(np.float32)),
    }


def changed_points(before: Tensor, after: Tensor) -> Tensor:
    """bool [B, P, P]: where what a point shows, `points` of `dense_labels`, is another thing after an edit."""
    return (before != after).any(-1)


@lru_cache(maxsize=64)
def geometry_at(scene: Scene, num_points: int) -> tuple[np.ndarray, ...]:
    """`render.geometry`, num_points along a side: in a batch a scene is seen, described and asked about many times."""
    return geometry(solids.tables(scene), num_points)


def only_seen(field: str, logits: Tensor, classes: Tensor, unseen_shapes: Tensor | None = None) -> Tensor:
    """Logits [..., classes of the field] of things of these classes of OF_A_THING [..., 4], -inf where training shows
    no thing that has such a shape or colour beside its other attributes. unseen_shapes: bool [..., 1 + shapes], the
    shapes that it does not show beside colours that are UNNAMED.

    Source: Menon et al., 2021, "Long-tail learning via logit adjustment", equation 10, where of all pairs those that
    are shown are equally frequent.
    """
    if field not in ("shape", "colour"):
        return logits
    if unseen_shapes is not None:
        return logits.masked_fill(unseen_shapes, -torch.inf)
    shapes, colours, *_ = classes.unbind(-1)
    unseen = _unseen_classes().to(logits.device)
    return logits.masked_fill(unseen.T[colours] if field == "shape" else unseen[shapes], -torch.inf)


@lru_cache(maxsize=1)
def _unseen_classes() -> Tensor:
    """bool [1 + shapes, 1 + colours]"""
    unseen = torch.zeros(1 + len(SHAPES), 1 + len(COLOURS), dtype=torch.bool)
    for shape, colour in UNSEEN_PAIRS:
        unseen[1 + SHAPES.index(shape), 1 + tuple(COLOURS).index(colour)] = True
    return unseen


def _balanced(errors: Tensor, there: Tensor) -> Tensor:
    """The mean over the points where a thing is, and EMPTY_WEIGHT of that over the others, nine of ten."""
    things, empty = (errors * mask for mask in (there, ~there))
    return things.sum() / there.sum().clamp(min=1) + EMPTY_WEIGHT * empty.sum() / (~there).sum().clamp(min=1)


def said_labels(scenes: Sequence[Scene]) -> Tensor:
    """uint8 [B, shapes x colours]: how many things of each shape and colour there are, MAX_SAID at most."""
    labels = torch.zeros(len(scenes), len(SHAPES) * len(COLOURS), dtype=torch.uint8)
    for row, scene in zip(labels, scenes):
        for thing in scene.things:
            row[SHAPES.index(thing.shape) * len(COLOURS) + tuple(COLOURS).index(thing.colour)] += 1
    return labels.clamp(max=MAX_SAID)


class SaidHead(nn.Module):
    """Reads from the mean of a text's states [B, T, D] what it speaks of: `said_labels` and the background."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.things = nn.Linear(dim, len(SHAPES) * len(COLOURS) * MAX_SAID)
        nn.init.constant_(self.things.bias, RARELY)
        self.background = nn.Linear(dim, len(OF_A_SCENE["background"]))

    def forward(self, states: Tensor, said: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropies of whether there are at least 1, 2, ... of each thing, and of the background [B]; and of
        what is there how much is found, both with probability 1/2 or more."""
        mean = self.norm(states.mean(1))
        logits = self.things(mean).unflatten(-1, (-1, MAX_SAID)).float()
        there = said[..., None] > torch.arange(MAX_SAID, device=said.device)
        loss = F.binary_cross_entropy_with_logits(logits, there.float(), reduction="none").sum((1, 2)).mean()
        loss = loss + F.cross_entropy(self.background(mean).float(), background)
        return loss, (logits.detach() > 0)[there].float().mean()


def of_things(scene: Scene) -> np.ndarray:
    """uint8 [1 + things, 4]: the classes of nothing, then of each thing."""
    rows = [[1 + names.index(getattr(thing, field)) for field, names in OF_A_THING.items()] for thing in scene.things]
    return np.array([[NOTHING] * len(OF_A_THING), *rows], np.uint8)


class DenseHead(nn.Module):
    """Reads `dense_labels` from states [B, T, D]; the tokens go row by row and each stands for p x p points.

    reads_surface: whether normals and depths are read too.
    """

    def __init__(self, dim: int, points_per_side: int, reads_surface: bool = True):
        super().__init__()
        self.p = points_per_side
        self.norm = nn.LayerNorm(dim)
        self.points = nn.Linear(dim, self.p**2 * sum(POINT_CLASSES))
        self.whole = nn.Linear(dim, sum(SCENE_CLASSES))
        self.surface = nn.Linear(dim, self.p**2 * 4) if reads_surface else None

    def forward(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a sum over what is read: cross-entropy, and the surface's squared error; points that are
        `changed`, a label of `changed_points`, count once more, as much as all together. And what to log: how often the
        thing at a point, where one is, is read rightly."""
        states = self.norm(states)
        changed = self.by_token(labels["changed"][..., None])[..., 0] if "changed" in labels else None
        points = self.by_token(labels["points"]).long()
        unseen = self.by_token(labels["unseen_shapes"]) if "unseen_shapes" in labels else None
        found = self.points(states).unflatten(-1, (self.p**2, -1)).float().split(POINT_CLASSES, dim=-1)
        there = points[..., 0] != NOTHING
        loss, right = states.new_zeros((), dtype=torch.float32), {}
        for name, logits, label in zip(OF_A_THING, found, points.unbind(-1)):
            if (label == UNNAMED).any():
                continue
            adjusted = only_seen(name, logits, points, unseen).flatten(0, -2)
            errors = F.cross_entropy(adjusted, label.flatten(), reduction="none").view_as(label)
            loss = loss + _balanced(errors, there)
            correct = (logits.detach().argmax(-1) == label).float()
            right[f"{name}_right"] = correct[there].mean()
            if changed is not None and changed.any():
                loss = loss + errors[changed].mean()
                right[f"{name}_changed_right"] = correct[changed].mean()
        if self.surface is not None:
            found_surface = self.surface(states).unflatten(-1, (self.p**2, -1)).float()
            squared = (found_surface - self.by_token(labels["surface"])).square().sum(-1)
            loss = loss + _balanced(squared, there)
            right["surface_error"] = squared.detach()[there].mean()
        if "whole" not in labels:
            return loss, right
        whole = self.whole(states.mean(1)).float().split(SCENE_CLASSES, dim=-1)
        for name, logits, label in zip(OF_A_SCENE, whole, labels["whole"].long().unbind(-1)):
            loss = loss + F.cross_entropy(logits, label) / len(OF_A_SCENE)
            right[f"{name}_right"] = (logits.detach().argmax(-1) == label).float().mean()
        return loss, right

    def agreement(self, states: Tensor, greys: Tensor, points: Tensor) -> Tensor:
        """The cross-entropy of the shapes that are read of things in colour from those that are read of the same things
        in greys, of which nothing is learned here; states of both [B, T, D], `points` of `dense_labels`.

        Beside a blue thing no class is left out here: whether one looks like a cylinder hangs on its edges and light,
        which greys show, though no cylinder is blue. Source: Hinton et al., 2015, "Distilling the knowledge in a neural
        network", section 2, between two views of a picture.
        """
        there = self.by_token(points)[..., 0] != NOTHING
        seen, wanted = (self._shapes(side)[there] for side in (states, greys.detach()))
        return F.cross_entropy(seen, wanted.detach().softmax(-1)) if there.any() else seen.sum()

    def _shapes(self, states: Tensor) -> Tensor:
        """Logits [B, T, p^2, 1 + shapes]."""
        return self.points(self.norm(states)).unflatten(-1, (self.p**2, -1)).float()[..., : POINT_CLASSES[0]]

    def by_token(self, points: Tensor) -> Tensor:
        """[B, P, P, n] -> [B, T, p^2, n]."""
        return by_token(points, self.p)


class PlaceHead(nn.Module):
    """Reads which of T tokens of a picture a state [B, T, D] is of, so that states hold their place and not only what
    is there: what is left of what, and where a token's pixels are drawn, hang on it."""

    def __init__(self, dim: int, num_tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.place = nn.Linear(dim, num_tokens)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy, and how often the place is read rightly."""
        logits = self.place(self.norm(states)).float().flatten(0, 1)
        places = torch.arange(states.shape[1], device=states.device).repeat(len(states))
        return F.cross_entropy(logits, places), (logits.detach().argmax(-1) == places).float().mean()


def by_token(points: Tensor, p: int) -> Tensor:
    """The p x p points of every token: [B, P, P, n] -> [B, T, p^2, n]."""
    B, P, _, n = points.shape
    cells = points.view(B, P // p, p, P // p, p, n).transpose(2, 3)
    return cells.reshape(B, -1, p**2, n)
