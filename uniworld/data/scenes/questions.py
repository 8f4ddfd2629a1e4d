"""Questions about a scene and their answers, alone or several in a conversation.

Answers are short and canonical: one word for one thing, digits for numbers, yes and no equally often.
"""

from collections.abc import Callable
from dataclasses import dataclass

from uniworld.data.scenes.captions import long_caption, short_caption
from uniworld.data.scenes.descriptions import RELATIONS, Description, attributes_of, describe
from uniworld.data.scenes.graph import COLOURS, SHAPES, SIZES, Scene, Thing, column, is_held_out
from uniworld.data.scenes.wording import Wording

OPPOSITES = dict(zip(RELATIONS, ("right of", "left of", "behind", "in front of")))
NO_THING_RATE = 0.1  # of questions how many, that are asked of what is not there
FOLLOW_UP_RATE = 0.4  # "and the cube?" after a question for a colour
MAX_TRIES = 40
# Of questions about none, one and two descriptions, where a template has the words of each: the first that it is given.
PHRASE_SLOTS = ((), (("things", "a", "the"),), (("things_1", "the_1"), ("things_2", "the_2")))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answer, and what it asks in terms of the graph.

    about: the descriptions in it, in the order that `value` refers to. phrases: the words of each of them. relation: of
    about[0] to about[1], or of the thing asked for to about[0]. value: the answer as the graph names it, such as "red",
    "3", "yes" or "red torus"; empty for captions.
    """

    kind: str
    text: str
    answer: str
    about: tuple[Description, ...] = ()
    phrases: tuple[str, ...] = ()
    relation: str | None = None
    value: str = ""


def ask(kind: str, scene: Scene, words: Wording, split: str) -> Question | None:
    """A question of one of KINDS, or None where this scene has none that is clear.

    split: in "train", no pair of shape and colour that is held out is asked for.
    """
    return KINDS[kind][1](scene, words, split)


def converse(scene: Scene, words: Wording, split: str, num_turns: int) -> tuple[Question, ...]:
    """Unlike questions about one picture; fewer than `num_turns` where the scene has no more."""
    kinds = COLOURLESS_KINDS if scene.style in COLOURLESS_STYLES else tuple(KINDS)
    weights = [KINDS[kind][0] for kind in kinds]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    turns: list[Question] = []
    for _ in range(MAX_TRIES):
        if len(turns) == num_turns:
            break
        if turns and turns[-1].kind == "colour" and words.chance(FOLLOW_UP_RATE):
            question = _colour(scene, words, split, section="ask colour next")
        else:
            question = ask(kinds[words.rng.choice(len(kinds), p=shares)], scene, words, split)
        if question is not None and all(_topic(question, scene) != _topic(turn, scene) for turn in turns):
            turns.append(question)
    return tuple(turns)


def _topic(question: Question, scene: Scene) -> tuple:
    """The same for two questions that ask for the same, in whatever words."""
    if question.kind.startswith("caption"):
        return ("caption",)
    return question.kind, tuple(description.matches(scene) for description in question.about)


def _colour(scene: Scene, words: Wording, _: str, section: str = "ask colour") -> Question | None:
    index, the = _one(scene, words, without=("colour",))
    if the is None:
        return None
    value = scene.things[index].colour
    return _question("colour", section, words, words.canonical("COLOURS", value), value, about=(the,))


def _shape(scene: Scene, words: Wording, _: str) -> Question | None:
    index, the = _one(scene, words, without=("shape",))
    if the is None:
        return None
    value = scene.things[index].shape
    return _question("shape", "ask shape", words, words.shape(value), value, about=(the,))


def _material(scene: Scene, words: Wording, _: str) -> Question | None:
    index, the = _one(scene, words, without=("material",))
    if the is None:
        return None
    value = scene.things[index].material
    return _question("material", "ask material", words, words.canonical("FINISHES", value), value, about=(the,))


def _where(scene: Scene, words: Wording, _: str) -> Question | None:
    index, the = _one(scene, words, place=False)
    value = column(scene.things[index])
    if the is None or not value:
        return None
    return _question("where", "ask where", words, words.canonical("SIDES", value), value, about=(the,))


def _count(scene: Scene, words: Wording, _: str) -> Question | None:
    thing = words.pick(scene.things)
    names = words.pick(((), ("shape",), ("shape",), ("colour",), ("colour",), ("shape", "colour")))
    asked = attributes_of(thing, names)
    if words.chance(NO_THING_RATE):
        absent = [shape for shape in SHAPES if all(thing.shape != shape for thing in scene.things)]
        asked = Description(shape=words.pick(absent))
    value = str(len(asked.matches(scene)))
    return _question("count", "ask count", words, value, value, about=(asked,), things=words.plural(asked))


def _exists(scene: Scene, words: Wording, split: str) -> Question | None:
    there = {(thing.shape, thing.colour) for thing in scene.things}
    yes = words.chance(0.5)
    if yes:
        shape, colour = words.pick(sorted(there))
    else:  # half of it is there, or nothing
        near = [(shape, colour) for shape, _ in there for colour in COLOURS]
        near += [(shape, colour) for _, colour in there for shape in SHAPES]
        far = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        allowed = [pair for pair in (near if words.chance(0.7) else far) if pair not in there]
        allowed = sorted(pair for pair in set(allowed) if split != "train" or not is_held_out(*pair))
        if not allowed:
            return None
        shape, colour = words.pick(allowed)
    asked = Description(shape=shape, colour=colour)
    return _yes_no("exists", words, yes, about=(asked,), a=words.a(asked))


def _relation(scene: Scene, words: Wording, _: str) -> Question | None:
    i, j, first, second = _two(scene, words)
    if first is None or second is None:
        return None
    true = [name for name, holds in RELATIONS.items() if holds(scene.things[i], scene.things[j])]
    if not true:
        return None
    name, yes = words.pick(true), words.chance(0.5)
    return _yes_no("relation", words, yes, (first, second), relation=name if yes else OPPOSITES[name])


def _what_at(scene: Scene, words: Wording, _: str) -> Question | None:
    index, the = _one(scene, words)
    name = words.pick(tuple(RELATIONS))
    others = [thing for i, thing in enumerate(scene.things) if i != index]
    there = [thing for thing in others if RELATIONS[name](thing, scene.things[index])]
    opposite = [thing for thing in others if RELATIONS[OPPOSITES[name]](thing, scene.things[index])]
    if the is None or len(there) != 1 or len(there) + len(opposite) != len(others):
        return None
    answer, value = words.name(there[0]), _pair(there[0])
    return _question("what_at", "ask what_at", words, answer, value, about=(the,), relation=name)


def _background(scene: Scene, words: Wording, _: str) -> Question | None:
    value = scene.background
    return _question("background", "ask background", words, words.canonical("BACKGROUND_NAMES", value), value)


def _style(scene: Scene, words: Wording, _: str) -> Question | None:
    return _question("style", "ask style", words, words.canonical("STYLE_NAMES", scene.style), scene.style)


def _unlike_sizes(scene: Scene, words: Wording) -> tuple[list[Thing], tuple[Description, ...]] | None:
    """Two things, the bigger first. A doll is compared with dolls only: it is taller than wide."""
    i, j, first, second = _two(scene, words, without=("size",))
    if first is None or second is None:
        return None
    things = [scene.things[i], scene.things[j]]
    if (things[0].shape == "doll") != (things[1].shape == "doll") or _pair(things[0]) == _pair(things[1]):
        return None
    order = SIZES.index(things[0].size) - SIZES.index(things[1].size)
    if order == 0:
        return None
    return (things, (first, second)) if order > 0 else (things[::-1], (second, first))


def _compare(kind: str) -> Callable[[Scene, Wording, str], Question | None]:
    def question(scene: Scene, words: Wording, _: str) -> Question | None:
        found = _unlike_sizes(scene, words)
        if found is None:
            return None
        (bigger, smaller), about = found
        asked = bigger if kind == "bigger" else smaller
        about = about if words.chance(0.5) else about[::-1]
        return _question(kind, f"ask {kind}", words, words.name(asked), _pair(asked), about=about)

    return question


def _is_bigger(scene: Scene, words: Wording, _: str) -> Question | None:
    found = _unlike_sizes(scene, words)
    if found is None:
        return None
    yes = words.chance(0.5)
    return _yes_no("is_bigger", words, yes, found[1] if yes else found[1][::-1])


def _same_colour(scene: Scene, words: Wording, _: str) -> Question | None:
    """Only where both answers were possible, else "no" would be the likely one."""
    pairs: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for j, second in enumerate(scene.things):
        for i, first in enumerate(scene.things[:j]):
            pairs[first.colour == second.colour].append((i, j))
    if not (pairs[True] and pairs[False]):
        return None
    yes = words.chance(0.5)
    about = tuple(describe(scene, i, words.rng, without=("colour",)) for i in words.pick(pairs[yes]))
    return None if None in about else _yes_no("same_colour", words, yes, about)


def _more(scene: Scene, words: Wording, _: str) -> Question | None:
    shapes = sorted({thing.shape for thing in scene.things}, key=SHAPES.index)
    numbers = {shape: sum(thing.shape == shape for thing in scene.things) for shape in shapes}
    pairs = [(a, b) for a in shapes for b in shapes if numbers[a] > numbers[b]]
    if not pairs:
        return None
    about = tuple(Description(shape=shape) for shape in words.pick(pairs))
    yes = words.chance(0.5)
    about = about if yes else about[::-1]
    return _yes_no("more", words, yes, about, things_1=words.plural(about[0]), things_2=words.plural(about[1]))


def _caption(scene: Scene, words: Wording, _: str) -> Question | None:
    text = words.sentence(words.fill("ask caption"))
    return Question(kind="caption", text=text, answer=words.sentence(short_caption(scene, words)))


def _caption_long(scene: Scene, words: Wording, _: str) -> Question | None:
    text = words.sentence(words.fill("ask caption long"))
    return Question(kind="caption long", text=text, answer=long_caption(scene, words))


# Kind -> how often it is asked, and what asks it.
KINDS: dict[str, tuple[float, Callable[[Scene, Wording, str], Question | None]]] = {
    "colour": (3.0, _colour),
    "shape": (2.0, _shape),
    "count": (3.0, _count),
    "exists": (2.5, _exists),
    "relation": (2.5, _relation),
    "what_at": (4.0, _what_at),
    "where": (1.5, _where),
    "material": (2.0, _material),
    "background": (1.5, _background),
    "style": (0.5, _style),
    "bigger": (1.5, _compare("bigger")),
    "smaller": (1.5, _compare("smaller")),
    "is_bigger": (1.5, _is_bigger),
    "same_colour": (2.0, _same_colour),
    "more": (2.0, _more),
    "caption": (1.5, _caption),
    "caption long": (1.0, _caption_long),
}


COLOURLESS_STYLES = ("pencil sketch", "black and white")
COLOURLESS_KINDS = ("background", "style")  # what can be asked of them without a word on colours


def _one(scene: Scene, words: Wording, **limits) -> tuple[int, Description | None]:
    index = int(words.rng.integers(len(scene.things)))
    return index, describe(scene, index, words.rng, **limits)


def _two(scene: Scene, words: Wording, **limits) -> tuple[int, int, Description | None, Description | None]:
    """Two things and their descriptions, None where they are not clear or there are not two."""
    if len(scene.things) < 2:
        return 0, 0, None, None
    i, j = words.rng.permutation(len(scene.things))[:2].tolist()
    return i, j, *(describe(scene, k, words.rng, **limits) for k in (i, j))


def _question(
    kind: str,
    section: str,
    words: Wording,
    answer: str,
    value: str,
    about: tuple[Description, ...] = (),
    relation: str | None = None,
    **slots: str,
) -> Question:
    slots |= _slots(words, about, relation)
    text = words.sentence(words.fill(section, **slots))
    said = tuple(next(slots[name] for name in names if name in slots) for names in PHRASE_SLOTS[len(about)])
    return Question(kind=kind, text=text, answer=answer, about=about, phrases=said, relation=relation, value=value)


def _yes_no(
    kind: str,
    words: Wording,
    yes: bool,
    about: tuple[Description, ...],
    relation: str | None = None,
    **slots: str,
) -> Question:
    answer = words.words.YES_NO[0 if yes else 1]
    value = "yes" if yes else "no"
    return _question(kind, f"ask {kind}", words, answer, value, about=about, relation=relation, **slots)


def _slots(words: Wording, about: tuple[Description, ...], relation: str | None) -> dict[str, str]:
    """{the} of one description, {the_1} and {the_2} of two, and the relation."""
    names = ("the",) if len(about) == 1 else ("the_1", "the_2")
    slots = {name: words.the(description) for name, description in zip(names, about)}
    if relation is not None:
        slots["relation"] = words.word("RELATIONS", relation)
    return slots


def _pair(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"
