"""Captions of scenes, and text-to-image prompts with what they ask for as data.

The kinds of prompt are GenEval's six, and captions of whole scenes.
"""

from collections import Counter
from dataclasses import dataclass

from uniworld.data.scenes.descriptions import RELATIONS, Description, attributes_of, describe
from uniworld.data.scenes.graph import Scene, Thing
from uniworld.data.scenes.wording import Wording

PROMPT_KINDS = ("single object", "two objects", "counting", "colors", "position", "attribute binding")
BACKGROUND_RATE = 0.4  # of prompts that name the background


@dataclass(frozen=True, kw_only=True)
class Want:
    """So many things that fit a description; `exactly` as many, or at least."""

    description: Description
    number: int = 1
    exactly: bool = False

    def holds(self, scene: Scene) -> bool:
        found = sum(map(self.description.fits, scene.things))
        return found == self.number if self.exactly else found >= self.number


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text-to-image prompt and what it asks for.

    kind: one of PROMPT_KINDS, or "caption". relation: how a thing that fits wants[0] stands to one that fits wants[1].
    background, style: None where the text leaves them open.
    """

    kind: str
    language: str
    text: str
    wants: tuple[Want, ...]
    relation: str | None = None
    background: str | None = None
    style: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether a scene, real or detected in a picture, is as the prompt asks."""
        if self.background not in (None, scene.background) or self.style not in (None, scene.style):
            return False
        return all(want.holds(scene) for want in self.wants) and self._related(scene)

    def _related(self, scene: Scene) -> bool:
        if self.relation is None:
            return True
        first, second = ([t for t in scene.things if want.description.fits(t)] for want in self.wants)
        return any(a is not b and RELATIONS[self.relation](a, b) for a in first for b in second)


def prompt_of(kind: str, scene: Scene, words: Wording, language: str) -> Prompt:
    """A prompt that is true of the scene.

    Args:
        scene: one thing for "single object" and "colors"; things of one shape for "counting"; two of unlike shape for
            the others, of unlike colour for "attribute binding".

    Raises: ValueError on another kind; a scene that does not fit the kind.
    """
    if kind == "caption":
        return _caption_prompt(scene, words, language)
    if kind not in PROMPT_KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join((*PROMPT_KINDS, 'caption'))}")
    wants, relation = _wants(kind, scene, words)
    slots = {"style": words.word("STYLES", scene.style)}
    if relation is not None:
        slots["relation"] = words.word("RELATIONS", relation)
    if kind == "counting":
        slots["n_things"] = words.a(wants[0].description, wants[0].number)
    elif len(wants) == 1:
        slots["a"] = words.a(wants[0].description)
    else:
        slots["a_1"], slots["a_2"] = (words.a(want.description) for want in wants)
    text = words.fill(f"prompt {kind}", using=_style_slot(scene), **slots)
    background = scene.background if words.chance(BACKGROUND_RATE) else None
    if background:
        at, noun = words.word("BACKGROUNDS_AT", background), words.word("BACKGROUNDS", background)
        text = words.fill("prompt_background", prompt=text, background_at=at, background=noun)
    return Prompt(
        kind=kind,
        language=language,
        text=words.sentence(text),
        wants=wants,
        relation=relation,
        background=background,
        style=scene.style if scene.style != "photo" else None,
    )


def _wants(kind: str, scene: Scene, words: Wording) -> tuple[tuple[Want, ...], str | None]:
    things = scene.things
    if kind == "counting":
        alike = len({thing.colour for thing in things}) == 1 and words.chance(0.6)
        names = ("shape", "colour") if alike else ("shape",)
        return (Want(description=attributes_of(things[0], names), number=len(things), exactly=True),), None
    names = ("shape",) if kind in ("single object", "two objects") else ("shape", "colour")
    if kind == "position" and words.chance(0.3):
        names = ("shape",)
    if kind != "position":
        return tuple(Want(description=attributes_of(thing, names)) for thing in things), None
    first, second = things if words.chance(0.5) else things[::-1]
    true = [name for name, holds in RELATIONS.items() if holds(first, second)]
    if not true:
        raise ValueError(f"scene={scene}: neither thing is clearly beside or behind the other")
    return tuple(Want(description=attributes_of(thing, names)) for thing in (first, second)), words.pick(true)


def _caption_prompt(scene: Scene, words: Wording, language: str) -> Prompt:
    groups = grouped(scene, words)
    text = words.fill("prompt caption", caption=short_caption(scene, words, groups, background=True))
    return Prompt(
        kind="caption",
        language=language,
        text=words.sentence(text),
        wants=tuple(Want(description=description, number=number) for description, number in groups),
        background=scene.background,
        style=scene.style if scene.style != "photo" else None,
    )


def grouped(scene: Scene, words: Wording, *, full: bool = False) -> list[tuple[Description, int]]:
    """The things by what is said of them, and how many there are of each kind.

    full: always say a size that is not medium, and a surface that is not matte; else now and then.
    """

    def said(thing: Thing) -> Description:
        names = ["shape", "colour"]
        if full or with_material:
            names += ["material"] if thing.material != "matte" else []
        if full or with_size:
            names += ["size"] if thing.size != "medium" else []
        return attributes_of(thing, names)

    with_material, with_size = words.chance(0.6), words.chance(0.4)
    return list(Counter(map(said, scene.things)).items())


def short_caption(
    scene: Scene,
    words: Wording,
    groups: list[tuple[Description, int]] | None = None,
    *,
    background: bool = False,
) -> str:
    """All things, perhaps with style and background; with the `background` for certain where asked for."""
    groups = grouped(scene, words) if groups is None else groups
    slots = {
        "style": words.word("STYLES", scene.style),
        "parts": words.listed([words.a(description, number) for description, number in groups]),
        "background_at": words.word("BACKGROUNDS_AT", scene.background),
    }
    using = (*_style_slot(scene), *(["{background_at}"] if background else []))
    return words.fill("caption short", using=using, **slots)


def _style_slot(scene: Scene) -> tuple[str, ...]:
    """What a template must hold: a style that is no photo has to be said."""
    return () if scene.style == "photo" else ("{style}",)


def long_caption(scene: Scene, words: Wording) -> str:
    """All things with surface and size, where some of them stand, the background and the light; whole sentences."""
    groups = grouped(scene, words, full=True)
    style = words.word("STYLES", scene.style)
    places = [_capital(text) for text in _places(scene, words)]
    text = words.fill(
        "caption long",
        style=style,
        there_is="there are" if groups[0][1] > 1 else "there is",
        parts=words.listed([words.a(description, number) for description, number in groups]),
        background=words.word("BACKGROUNDS", scene.background),
        background_at=words.word("BACKGROUNDS_AT", scene.background),
        places=words.joined(places),
        light=words.word("LIGHTS", scene.light),
    )
    return _capital(" ".join(text.split()))


def _places(scene: Scene, words: Wording) -> list[str]:
    """Up to two sentences on where things stand."""
    true = [
        (i, name, j)
        for i, a in enumerate(scene.things)
        for j, b in enumerate(scene.things)
        for name, holds in RELATIONS.items()
        if i < j and holds(a, b)
    ]
    sentences = []
    for number in words.rng.permutation(len(true))[:2].tolist():
        i, name, j = true[number]
        first, second = describe(scene, i, words.rng), describe(scene, j, words.rng)
        if first and second:
            relation = words.word("RELATIONS", name)
            sentences.append(
                words.fill("caption place", the_1=words.the(first), the_2=words.the(second), relation=relation)
            )
    return sentences


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
