"""What has to be known of the things that a question speaks of, where its answer begins.

Whether one thing stands left of another, is bigger, or has its colour: from yes and no alone that is learned very late.
Who answers must have gathered, from all the picture, how many things play each of the roles of `grounding`, and of the
one that plays it alone its attributes and its place; which relation is asked for; and how the first thing compares with
the second: farther to the right, farther away, bigger, more of them, of its colour. From these the answer is a small
step. The scene graph says them, and linear layers read them from the state of the last token before the answer, in the
middle of the language model and at its end. The layers are thrown away. They supervise what models that reason in words
write down before they answer (Johnson et al., 2017, CLEVR, section 3: the functional program of a question).

Letters: N questions, D width of a state, R = 3 roles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.data.scenes.descriptions import RELATIONS
from uniworld.data.scenes.graph import Scene
from uniworld.data.scenes.questions import Question
from uniworld.train.parts.dense import NOTHING, OF_A_THING, POINT_CLASSES, UNNAMED, of_things, only_seen
from uniworld.train.parts.grounding import ROLES, things_of

MAX_NUMBER = 3  # and more
PLACE_WEIGHT = 8.0  # of squared errors, whose sides are nearer than 0.1 to one another
COMPARED = ("x", "z", "size", "number", "colour")  # whether the first has more of it; of colours whether they are alike
COMPARED_WEIGHT, MIN_APART = 2.0, 0.15  # of what differs by less nothing is said
NO_RELATION = len(RELATIONS)


def known_labels(pairs: Sequence[tuple[Scene, Question]]) -> dict[str, Tensor]:
    """number uint8 [N, R]: how many things play each role, MAX_NUMBER at most. things uint8 [N, R, 4]: classes of
    OF_A_THING, NOTHING where not one alone plays it. place fp32 [N, R, 2]: of that one, x and z, both -1 to 1. relation
    int64 [N]: which of RELATIONS is asked for, or NO_RELATION."""
    number = torch.zeros(len(pairs), len(ROLES), dtype=torch.uint8)
    things = torch.full((len(pairs), len(ROLES), len(OF_A_THING)), NOTHING, dtype=torch.uint8)
    place = torch.zeros(len(pairs), len(ROLES), 2)
    for row, (scene, question) in enumerate(pairs):
        classes = torch.from_numpy(of_things(scene))
        for role, players in enumerate(things_of(question, scene)):
            number[row, role] = min(len(players), MAX_NUMBER)
            if len(players) == 1:
                thing = scene.things[players[0]]
                things[row, role] = classes[1 + players[0]]
                place[row, role] = torch.tensor([thing.x, 2 * thing.z - 1])
    relation = [NO_RELATION if q.relation is None else list(RELATIONS).index(q.relation) for _, q in pairs]
    return {"number": number, "things": things, "place": place, "relation": torch.tensor(relation)}


class KnownHead(nn.Module):
    """Reads `known_labels` from states [N, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.sizes = (1 + MAX_NUMBER, *POINT_CLASSES, 2)
        self.norm = nn.LayerNorm(dim)
        self.roles = nn.Linear(dim, len(ROLES) * sum(self.sizes))
        self.between = nn.Linear(dim, 1 + NO_RELATION + len(COMPARED))

    def forward(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss: cross-entropies of number and attributes and the squared error of the place, summed over them, the
        last two over the roles that one thing plays; and what `_compared` adds. And what to log: how many of each are
        read rightly, and the place's root mean squared error."""
        states = self.norm(states)
        comparing, told = self._compared(states, labels)
        loss, right = self._of_roles(states, labels)
        return loss + comparing, right | told

    def _of_roles(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        number, *attributes, place = (
            self.roles(states).unflatten(-1, (len(ROLES), -1)).float().split(self.sizes, dim=-1)
        )
        labels = {name: label.to(states.device) for name, label in labels.items()}
        wanted = labels["number"].long()
        loss = F.cross_entropy(number.flatten(0, 1), wanted.flatten())
        right = {"known_number_right": (number.detach().argmax(-1) == wanted).float().mean()}
        alone = wanted == 1
        if not alone.any():
            return loss, right
        things = labels["things"].long()
        unseen = labels["unseen_shapes"][alone] if "unseen_shapes" in labels else None
        for name, logits, label in zip(OF_A_THING, attributes, things.unbind(-1)):
            if (label == UNNAMED).any():
                continue
            adjusted = only_seen(name, logits[alone], things[alone], unseen)
            loss = loss + F.cross_entropy(adjusted, label[alone])
            right[f"known_{name}_right"] = (logits.detach().argmax(-1) == label)[alone].float().mean()
        squared = (place - labels["place"])[alone].square().mean()
        return loss + PLACE_WEIGHT * squared, right | {"known_place_error": squared.detach().sqrt()}

    def _compared(self, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropies of the relation, and of `compared` where there is something to compare."""
        relation, more = self.between(states).float().split((1 + NO_RELATION, len(COMPARED)), dim=-1)
        wanted = labels["relation"].to(states.device)
        loss = F.cross_entropy(relation, wanted)
        right = {"known_relation_right": (relation.detach().argmax(-1) == wanted).float().mean()}
        wanted, told = (label.to(states.device) for label in compared(labels))
        if not told.any():
            return loss, right
        errors = F.binary_cross_entropy_with_logits(more[told], wanted[told].float())
        right["known_compared_right"] = ((more.detach() > 0) == wanted)[told].float().mean()
        return loss + COMPARED_WEIGHT * errors, right


def compared(labels: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """bool [N, 5] each, of `known_labels`: whether what is named first has more of each of COMPARED than what is named
    second, and whether that can be said: of numbers where both are there, of all else where each is one thing."""
    place, things, number = labels["place"], labels["things"].long(), labels["number"].long()[:, :2]
    first, second = things[:, 0], things[:, 1]
    size, colour = (list(OF_A_THING).index(name) for name in ("size", "colour"))
    apart = torch.cat(
        [place[:, 0] - place[:, 1], (first - second)[:, size, None], (number[:, 0] - number[:, 1])[:, None]], dim=1
    )
    single, there = (number == 1).all(1, keepdim=True), (number > 0).all(1, keepdim=True)
    alike = (first == second)[:, colour, None]
    named = (first != UNNAMED)[:, colour, None]
    told = (apart.abs() > MIN_APART) & torch.cat([single, single, single, there], dim=1)
    return torch.cat([apart > 0, alike], dim=1), torch.cat([told, single & named], dim=1)
