"""What the VLM of `tiny` must know where an answer begins (`uniworld/train/parts/known.py`)."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Thing, is_held_out
from uniworld.data.scenes.questions import Question
from uniworld.train.parts.dense import POINT_CLASSES, UNNAMED
from uniworld.train.parts.known import KnownHead, compared, known_labels

SCENE = Scene(
    things=(
        Thing(shape="ball", colour="red", material="metal", size="large", x=-0.5, z=0.25),
        Thing(shape="cube", colour="blue", x=0.5, z=1.0),
        Thing(shape="cube", colour="red", size="small", x=0.0, z=0.5),
    )
)
LEFT_OF = Question(
    kind="relation",
    text="Is the ball left of the cubes?",
    answer="yes",
    about=(Description(shape="ball"), Description(shape="cube")),
    relation="left of",
    value="yes",
)
BIGGER = Question(
    kind="bigger",
    text="Which is bigger, the ball or the blue cube?",
    answer="the red ball",
    about=(Description(shape="cube", colour="blue"), Description(shape="ball")),
    value="red ball",
)


def classes(*attributes: str) -> list[int]:
    return [1 + names.index(name) for names, name in zip((SHAPES, list(COLOURS), MATERIALS, SIZES), attributes)]


def test_labels_are_of_the_things_that_a_question_speaks_of():
    labels = known_labels([(SCENE, LEFT_OF), (SCENE, BIGGER)])
    assert labels["number"].tolist() == [[1, 2, 0], [1, 1, 1]]
    ball, cube = classes("ball", "red", "metal", "large"), classes("cube", "blue", "matte", "medium")
    assert labels["things"].tolist() == [[ball, [0] * 4, [0] * 4], [cube, ball, ball]]
    assert labels["place"].tolist() == [[[-0.5, -0.5], [0, 0], [0, 0]], [[0.5, 1], [-0.5, -0.5], [-0.5, -0.5]]]
    assert labels["relation"].tolist() == [0, 4]  # left of, and none


def test_many_things_count_as_three_at_most():
    things = tuple(Thing(shape="ball", colour="red", x=x) for x in (-1, -0.5, 0, 0.5, 1))
    question = Question(kind="count", text="How many balls?", answer="5", about=(Description(shape="ball"),), value="5")
    assert known_labels([(Scene(things=things), question)])["number"].tolist() == [[3, 0, 0]]


def test_the_loss_is_that_of_each_role_and_only_of_single_things():
    """Against torch's losses, role by role, in fp64."""
    torch.manual_seed(0)
    head, states = KnownHead(16).double(), torch.randn(2, 16, dtype=torch.float64)
    labels = known_labels([(SCENE, LEFT_OF), (SCENE, BIGGER)])
    loss, logged = head(states, labels)
    read = head.roles(F.layer_norm(states, (16,))).view(2, 3, -1).float()
    every, single = [(n, r) for n in (0, 1) for r in range(3)], [(0, 0), (1, 0), (1, 1), (1, 2)]

    def entropy(columns, name, pairs, column=...):
        each = []
        for n, r in pairs:
            of, label = read[n, r, columns].clone(), labels[name][n, r][column].long()
            if name == "things" and column < 2:  # neither shapes nor colours that training cannot show beside the other
                of[[c for c in range(1, len(of)) if unseen(column, c, labels["things"][n, r])]] = -torch.inf
            each.append(F.cross_entropy(of, label))
        return torch.stack(each).mean()

    def unseen(column, other, things):
        shape, colour = (other, things[1]) if column == 0 else (things[0], other)
        return is_held_out(SHAPES[shape - 1], list(COLOURS)[colour - 1])

    expected, start = entropy(slice(0, 4), "number", every), 4
    for column, size in enumerate(POINT_CLASSES):
        expected = expected + entropy(slice(start, start + size), "things", single, column)
        start += size
    squared = torch.stack([(read[n, r, start:] - labels["place"][n, r]).square().mean() for n, r in single]).mean()
    between = head.between(F.layer_norm(states, (16,))).float()
    expected = expected + F.cross_entropy(between[:, :5], torch.tensor([0, 4]))
    # Fewer; and to the right, farther away, smaller, of another colour.
    said = [(0, 3, 0.0), (1, 0, 1.0), (1, 1, 1.0), (1, 2, 0.0), (1, 4, 0.0)]
    errors = [F.binary_cross_entropy_with_logits(between[n, 5 + i], between.new_tensor(y)) for n, i, y in said]
    expected = expected + 2 * torch.stack(errors).mean()
    right = [float((between[n, 5 + i] > 0) == y) for n, i, y in said]
    assert float(logged["known_compared_right"]) == pytest.approx(sum(right) / 5)
    assert float(loss.detach()) == pytest.approx(float((expected + 8 * squared).detach()), rel=1e-5)
    assert float(logged["known_place_error"]) == pytest.approx(float(squared) ** 0.5, rel=1e-5)


def test_it_reads_what_a_state_holds():
    labels = known_labels([(SCENE, LEFT_OF), (SCENE, BIGGER)])
    torch.manual_seed(0)
    head, states = KnownHead(16), torch.randn(2, 16)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        loss, logged = head(states, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = {name: float(value) for name, value in logged.items()}
    assert right.pop("known_place_error") < 0.1 and set(right.values()) == {1.0}


def test_questions_about_nothing_single_have_numbers_only():
    question = Question(kind="style", text="What style?", answer="photo", value="photo")
    loss, logged = KnownHead(16)(torch.randn(1, 16), known_labels([(SCENE, question)]))
    assert set(logged) == {"known_number_right", "known_relation_right"} and float(loss.detach()) > 0


def test_what_can_be_compared_are_single_things_that_differ():
    """x, z, size, number, colour: of a ball and a cone as far away and of its colour, of a near one whose colour has no
    name, and of balls and a cone."""
    question = dataclasses.replace(LEFT_OF, about=(Description(shape="ball"), Description(shape="cone")))
    ball = Thing(shape="ball", colour="red", x=-0.5, z=0.5)
    cone = Thing(shape="cone", colour="red", size="large", x=0.5, z=0.55)
    near = dataclasses.replace(cone, size="medium", x=-0.4)
    scenes = [Scene(things=things) for things in ((ball, cone), (ball, near), (ball, near, ball))]
    labels = known_labels([(scene, question) for scene in scenes])
    labels["things"][1, :, 1] = UNNAMED
    more, told = compared(labels)
    assert told.int().tolist() == [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    assert more[told].int().tolist() == [0, 0, 1, 1]
