"""Which things a question speaks of, learned from the states of a picture's tokens, so that words and things meet.

Who answers "what colour is the small ball?" must first find the ball. From answers alone that is learned late: after
150,000 conversations of them whether a thing is there was still a guess, though the tower saw it. Here the scene graph
says it, as in the training of models that point (Deitke et al., 2024, Molmo), for every point of a picture that stands
behind a question: does it show the thing that is spoken of first, the one that is spoken of second, and the one that is
asked for? Linear layers on states in the middle of the language model read it, and are thrown away. First the model
learns to point at what a few words describe, many of them for each picture.

Letters: B pictures, T tokens, one for every p x p points, D width of a state, P points along a side.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.data.scenes.descriptions import EXTREMES, WAYS, attributes_of
from uniworld.data.scenes.edits import draw_key
from uniworld.data.scenes.graph import Scene, is_held_out
from uniworld.data.scenes.questions import COLOURLESS_STYLES, Question
from uniworld.data.scenes.wording import Wording
from uniworld.train.parts.dense import NOTHING, OF_A_THING, by_token, geometry_at

ROLES = ("first", "second", "asked")
OTHER, PLAYS, EMPTY, NO_QUESTION = range(4)  # labels; the last of a picture that no question stands before
POINT = "point"  # the kind of a description without a question
ABSENT_RATE = 0.25  # of descriptions, how many name something else in one of their words, which is seldom there
EXTREME_RATE = 0.15  # of descriptions, how many are of the leftmost of its kind and the like
WEIGHTS = {PLAYS: 0.5, OTHER: 0.5, EMPTY: 0.1}  # else every thing is taken for the one that is meant: most is empty


def asked_labels(pairs: Sequence[tuple[Scene, Question | None]], num_points: int) -> Tensor:
    """uint8 [B, P, P, 3], P = num_points: of every point and role whether what it shows plays that role in the question
    or is another thing, whether it shows none, or NO_QUESTION."""
    labels = []
    for scene, question in pairs:
        if question is None:
            labels.append(np.full((num_points, num_points, len(ROLES)), NO_QUESTION, np.uint8))
            continue
        ids = geometry_at(scene, num_points)[0]
        plays = np.full((1 + len(scene.things), len(ROLES)), OTHER, np.uint8)
        plays[0] = EMPTY
        for column, things in enumerate(things_of(question, scene)):
            plays[[1 + index for index in things], column] = PLAYS
        labels.append(plays[ids])
    return torch.from_numpy(np.stack(labels))


def changed_labels(before: Tensor, changed: Tensor) -> Tensor:
    """uint8 [B, P, P], for the first of ROLES in an instruction: what changes plays it, a thing or where one is to be,
    and other things do not. before: `points` of `dense_labels` [B, P, P, 4]; changed: of `changed_points`."""
    elsewhere = torch.where(before[..., 0] == NOTHING, EMPTY, OTHER)
    return torch.where(changed, PLAYS, elsewhere).to(torch.uint8)


def descriptions(scene: Scene, words: Wording, number: int) -> list[Question]:
    """Words for one or several things of the scene, or for what is not there; no words where colours do not show, for
    most name one."""
    found = []
    for _ in range(0 if scene.style in COLOURLESS_STYLES else number):
        named = draw_key(WAYS, words.rng)
        meant = attributes_of(words.pick(scene.things), named)
        if words.chance(ABSENT_RATE):
            name = words.pick(named)
            other = dataclasses.replace(meant, **{name: words.pick(OF_A_THING[name])})
            # What training never shows is not learned as what is never there.
            meant = meant if other.shape and other.colour and is_held_out(other.shape, other.colour) else other
        if words.chance(EXTREME_RATE):
            meant = dataclasses.replace(meant, extreme=words.pick(tuple(EXTREMES)))
        text = words.the(meant)
        found.append(Question(kind=POINT, text=text, answer="", about=(meant,), phrases=(text,)))
    return found


def things_of(question: Question, scene: Scene) -> tuple[tuple[int, ...], ...]:
    """The things that play each of ROLES; none in a question about the whole picture, and none asked for where the
    answer is yes, no or a number."""
    spoken_of = [description.matches(scene) for description in question.about] + [(), ()]
    first, second = spoken_of[:2]
    if question.kind in ("colour", "shape", "material", "where", POINT):
        return first, second, first
    named = [i for i, thing in enumerate(scene.things) if f"{thing.colour} {thing.shape}" == question.value]
    if question.kind == "what_at":
        return first, second, tuple(named)
    return first, second, tuple(i for i in named if i in first + second)


class GroundingHead(nn.Module):
    """Reads `asked_labels` from states [B, T, D]; the tokens go row by row and each stands for p x p points."""

    def __init__(self, dim: int, points_per_side: int):
        super().__init__()
        self.p = points_per_side
        self.norm = nn.LayerNorm(dim)
        self.roles = nn.Linear(dim, self.p**2 * len(ROLES))

    def forward(self, states: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: the cross-entropies, summed over the roles, of points of things that play one, of other things and
        of none, by WEIGHTS. And what to log: of the points of things how many are told rightly, the mean over those
        that play a role and those that do not."""
        wanted = by_token(labels, self.p)
        logits = self.roles(self.norm(states)).unflatten(-1, (self.p**2, len(ROLES))).float()
        errors = F.binary_cross_entropy_with_logits(logits, (wanted == PLAYS).float(), reduction="none")
        loss, told = states.new_zeros((), dtype=torch.float32), {}
        for name, error, label, logit in zip(ROLES, errors.unbind(-1), wanted.unbind(-1), logits.detach().unbind(-1)):
            for value, weight in WEIGHTS.items():
                side = label == value
                loss = loss + weight * (error * side).sum() / side.sum().clamp(min=1)
            plays, other = (logit > 0)[label == PLAYS], (logit <= 0)[label == OTHER]
            if plays.numel() and other.numel():
                told[f"{name}_told"] = (plays.float().mean() + other.float().mean()) / 2
        return loss, told
