"""Which things a question speaks of: labels from the scene graph, and what a head reads."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from uniworld.data.scenes import solids
from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import Scene, Thing
from uniworld.data.scenes.questions import Question
from uniworld.data.scenes.render import geometry
from uniworld.data.scenes.tasks import make_item
from uniworld.data.scenes.wording import wording
from uniworld.models.prompts import IMAGE
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.dense import changed_points, dense_labels
from uniworld.train.parts.grounding import (
    EMPTY,
    NO_QUESTION,
    OTHER,
    PLAYS,
    GroundingHead,
    asked_labels,
    changed_labels,
    descriptions,
    things_of,
)
from uniworld.train.parts.vlm import VisionLanguage
from uniworld.train.parts.vlm_batches import NUM_TOKENS, SEEN_TASKS, Batches

BALL, CUBE, CONE = (
    Thing(shape="ball", colour="red", x=-0.7, z=0.3),
    Thing(shape="cube", colour="blue", x=0.0, z=0.3),
    Thing(shape="cone", colour="red", x=0.7, z=0.3),
)
SCENE = Scene(things=(BALL, CUBE, CONE))
RED, BLUE, BALLS = Description(colour="red"), Description(colour="blue"), Description(shape="ball")


@pytest.fixture(scope="module")
def pointing(words, tmp_path_factory):
    """A fresh VLM, a batch of descriptions, and the items they are of."""
    folder = tmp_path_factory.mktemp("pointing")
    config = PartConfig(part="vlm", run_dir=str(folder), words=str(words), num_steps=1, look_items=3)
    part = VisionLanguage(config)
    items = [make_item(SEEN_TASKS[seed], seed) for seed in range(3)]
    return part, part.make(range(3)), items


def test_pictures_are_looked_at_first_wherever_the_items_begin(pointing):
    part, _, _ = pointing
    batches = Batches(dataclasses.replace(part.config, first_item=6), part.processor)
    assert ["labels" in batches.make(range(start, start + 3)) for start in (6, 36)] == [False, True]


def question(kind, about=(), value="", relation=None):
    return Question(kind=kind, text="?", answer="!", about=about, value=value, relation=relation)


@pytest.mark.parametrize("asked, roles", [
    (question("count", (RED,), "2"), ((0, 2), (), ())),
    (question("colour", (BALLS,), "red"), ((0,), (), (0,))),
    (question("relation", (BALLS, BLUE), "yes"), ((0,), (1,), ())),
    (question("what_at", (BLUE,), "red cone", "right of"), ((1,), (), (2,))),
    (question("bigger", (BALLS, BLUE), "blue cube"), ((0,), (1,), (1,))),
    (question("exists", (Description(shape="torus", colour="pink"),), "no"), ((), (), ())),
    (question("background", value="studio"), ((), (), ())),
])  # fmt: skip
def test_things_play_the_roles_that_the_words_give_them(asked, roles):
    assert things_of(asked, SCENE) == roles


def test_labels_say_of_every_point_whether_its_thing_is_meant():
    labels = asked_labels([(SCENE, question("what_at", (BLUE,), "red cone")), (SCENE, None)], 24)
    ids = torch.from_numpy(geometry(solids.tables(SCENE), 24)[0])
    assert labels.shape == (2, 24, 24, 3) and set(ids.unique().tolist()) == {0, 1, 2, 3}
    expected = {0: [EMPTY] * 3, 1: [OTHER] * 3, 2: [PLAYS, OTHER, OTHER], 3: [OTHER, OTHER, PLAYS]}
    for number, roles in expected.items():
        assert (labels[0][ids == number] == torch.tensor(roles)).all()
    assert (labels[1] == NO_QUESTION).all()


def test_what_an_instruction_changes_is_what_it_speaks_of():
    """The blue cube turns green: it alone is meant. Then a thing is to be where none was: so is its place."""
    green = dataclasses.replace(SCENE, things=(BALL, dataclasses.replace(CUBE, colour="green"), CONE))
    fewer = dataclasses.replace(SCENE, things=(BALL, CUBE))
    before, after = (dense_labels(scenes, 24)["points"] for scenes in ((SCENE, fewer), (green, SCENE)))
    labels = changed_labels(before, changed_points(before, after))
    ids = torch.from_numpy(geometry(solids.tables(SCENE), 24)[0])
    for label, expected in zip(labels, ([EMPTY, OTHER, PLAYS, OTHER], [EMPTY, OTHER, OTHER, PLAYS])):
        assert label.dtype == torch.uint8 and torch.equal(label, torch.tensor(expected, dtype=torch.uint8)[ids.long()])


def test_a_head_finds_what_its_states_hold():
    """From one-hot places, learned by heart; a picture without a question takes no part."""
    labels = asked_labels([(SCENE, question("relation", (BALLS, BLUE), "yes")), (SCENE, None)], 24)
    states = torch.eye(72)[None].unflatten(1, (2, 36)).squeeze(0)
    torch.manual_seed(0)
    head = GroundingHead(72, 4)
    first = head(states, labels)[0].item()
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(60):
        loss, told = head(states, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first and told["first_told"] == told["second_told"] == 1
    other = states.clone()
    other[1] = torch.randn(36, 72)
    assert head(other, labels)[0].item() == pytest.approx(loss.item(), abs=0.01)


def test_things_weigh_more_than_what_is_empty():
    """All wrong by 1 nat: of each role half for things that play it, half for others, a tenth for what is empty."""
    labels = asked_labels([(SCENE, question("relation", (BALLS, BLUE), "yes"))], 24)
    head = GroundingHead(8, 4)
    torch.nn.init.zeros_(head.roles.weight)
    torch.nn.init.zeros_(head.roles.bias)
    loss, told = head(torch.randn(1, 36, 8), labels)
    log2 = 0.6931
    assert loss.item() == pytest.approx((2 * 1.1 + 0.6) * log2, rel=1e-3)  # nothing is asked for: no points play it
    assert told["first_told"] == pytest.approx(0.5)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_descriptions_are_of_one_thing_or_several_or_none(language):
    found = descriptions(SCENE, wording(language, np.random.default_rng(0)), 150)
    assert len(found) == 150 and all(asked.text and asked.kind == "point" for asked in found)
    meant = [things_of(asked, SCENE) for asked in found]
    assert all(first == asked and second == () for first, second, asked in meant)
    plain = [first for (first, _, _), asked in zip(meant, found) if asked.about[0].extreme is None]
    assert {len(first) for first in plain} == {0, 1, 2, 3}  # of two red things, say, both are meant
    assert 0.05 < plain.count(()) / len(plain) < 0.3
    assert {index for first in plain for index in first} == {0, 1, 2}
    assert descriptions(dataclasses.replace(SCENE, style="black and white"), wording(language, None), 5) == []


def test_every_description_is_read_with_its_own_picture(pointing):
    """As whole prompts with their pictures, encoded one by one, give it."""
    part, batch, items = pointing
    with torch.no_grad():
        part.loss(batch, torch.Generator())
        of_pictures = batch["input_ids"] == part.processor.tokens.image_pad
        states = part._at_layer[2][of_pictures].unflatten(0, (len(batch["row"]), -1)).clone()
        for n in (0, len(states) - 1):
            ids = batch["input_ids"][n][batch["attention_mask"][n] == 1]
            text = part.processor.tokenizer.decode(ids).split("<|vision_start|>")[0] + IMAGE
            picture = Image.fromarray(items[batch["row"][n]].pictures[-1])
            part._states(vars(part.processor.encode([text], [[picture]])))
            own = part._at_layer[2][0, -NUM_TOKENS - 1 : -1]
            assert float((states[n] - own).norm() / own.norm()) < 1e-4
