"""Puts descriptions into words: templates, synonyms and grammar of English and Chinese.

A `Wording` draws every choice from one random generator, so that the same generator gives the same words.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from uniworld.data.scenes import (
    edit_phrases_en,
    edit_phrases_zh,
    phrases_en,
    phrases_zh,
    words_en,
    words_zh,
)
from uniworld.data.scenes.descriptions import Description
from uniworld.data.scenes.graph import Thing

LANGUAGES = ("en", "zh")
SAID = "_said"  # ends the name of a section whose templates are no orders
SAID_RATE = 0.2


class Wording:
    """The words of one language.

    phrases: section -> templates. words: the tables of `words_en.py` or `words_zh.py`. spaced: whether spaces part
    words.
    """

    phrases: dict[str, tuple[str, ...]]
    words: ModuleType
    spaced: bool

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def pick(self, options: Sequence) -> Any:
        return options[self.rng.integers(len(options))]

    def chance(self, rate: float) -> bool:
        return self.rng.random() < rate

    def word(self, table: str, key: str) -> str:
        """One of the synonyms."""
        return self.pick(getattr(self.words, table)[key])

    def canonical(self, table: str, key: str) -> str:
        """The one word that answers use."""
        return getattr(self.words, table)[key][0]

    def fill(self, section: str, *, using: Sequence[str] = (), **slots: Any) -> str:
        """A template of the section with its slots filled; one that holds all of the texts `using`."""
        templates = self.phrases[section]
        if using:
            templates = [template for template in templates if all(text in template for text in using)]
        return self.pick(templates).format(**slots)

    def order(self, section: str, *, joined: bool = False, **slots: Any) -> str:
        """As `fill`, now and then as a wish or a question where the section has such; an order if it is `joined`."""
        if not joined and section + SAID in self.phrases and self.chance(SAID_RATE):
            section += SAID
        return self.fill(section, **slots)

    def the(self, description: Description) -> str:
        """The one thing meant, such as "the red ball"."""
        raise NotImplementedError

    def a(self, description: Description, number: int = 1) -> str:
        """Such as "a red ball" or "two red balls"."""
        raise NotImplementedError

    def plural(self, description: Description) -> str:
        """Such as "red balls", as one counts them."""
        raise NotImplementedError

    def listed(self, parts: Sequence[str]) -> str:
        """Such as "a, b and c"."""
        raise NotImplementedError

    def joined(self, sentences: Sequence[str]) -> str:
        """Whole sentences one after the other."""
        raise NotImplementedError

    def sentence(self, text: str) -> str:
        """As somebody would type it: now and then without a capital letter or a full stop."""
        raise NotImplementedError

    def article(self, word: str) -> str:
        """The word with its indefinite article, where the language has one."""
        raise NotImplementedError

    def shape(self, shape: str) -> str:
        """The canonical name of a shape, such as "ball"."""
        raise NotImplementedError

    def name(self, thing: Thing) -> str:
        """The canonical name of a thing in an answer, such as "red ball"."""
        raise NotImplementedError


class English(Wording):
    phrases = phrases_en.PHRASES | edit_phrases_en.EDIT_PHRASES
    words = words_en
    spaced = True

    def the(self, description: Description) -> str:
        noun = self._noun(description, plural=False)
        if description.extreme:
            noun = self.word("EXTREMES", description.extreme).format(noun)
        return f"the {noun}"

    def a(self, description: Description, number: int = 1) -> str:
        noun = self._noun(description, plural=number != 1)
        if number == 1:
            return self.article(noun)
        return f"{self.words.NUMBERS[number]} {noun}"

    def plural(self, description: Description) -> str:
        return self._noun(description, plural=True)

    def listed(self, parts: Sequence[str]) -> str:
        *first, last = parts
        return f"{', '.join(first)} and {last}" if first else last

    def joined(self, sentences: Sequence[str]) -> str:
        return " ".join(sentences)

    def sentence(self, text: str) -> str:
        if self.chance(0.5):
            text = text[0].upper() + text[1:]
        asks = text.endswith("?")
        if not asks and text[-1] != "." and self.chance(0.4):
            text += "."
        return text[:-1] if asks and self.chance(0.1) else text

    def article(self, word: str) -> str:
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    def shape(self, shape: str) -> str:
        return self.words.SHAPES[shape][0][0]

    def name(self, thing: Thing) -> str:
        return f"{self.canonical('COLOURS', thing.colour)} {self.shape(thing.shape)}"

    def _noun(self, description: Description, plural: bool) -> str:
        tables = (("SIZES", description.size), ("COLOURS", description.colour), ("MATERIALS", description.material))
        adjectives = [self.word(table, key) for table, key in tables if key]
        if description.colour and description.material and self.chance(0.3):
            adjectives[-2:] = reversed(adjectives[-2:])
        nouns = self.words.SHAPES[description.shape] if description.shape else self.words.THING
        return " ".join([*adjectives, self.pick(nouns)[plural]])


class Chinese(Wording):
    phrases = phrases_zh.PHRASES | edit_phrases_zh.EDIT_PHRASES
    words = words_zh
    spaced = False

    def the(self, description: Description) -> str:
        noun = self.plural(description)
        if description.extreme:
            return self.word("EXTREMES", description.extreme).format(noun)
        return f"那个{noun}" if self.chance(0.15) else noun

    def a(self, description: Description, number: int = 1) -> str:
        return f"{self.words.NUMBERS[number]}个{self.plural(description)}"

    def plural(self, description: Description) -> str:
        parts = []
        noun = self.pick(self.words.SHAPES[description.shape] if description.shape else self.words.THING)
        if description.size:
            size = self.word("SIZES", description.size)
            if size.endswith("的"):
                parts.append(size)
            else:
                noun = size + noun
        if description.material:
            parts.append(self.word("MATERIALS", description.material))
        if description.colour:
            colour = self.word("COLOURS", description.colour)
            if self.chance(0.6):
                noun = colour + noun
            else:
                parts.append(f"{colour}的")
        return "".join([*parts, noun])

    def listed(self, parts: Sequence[str]) -> str:
        *first, last = parts
        return f"{'、'.join(first)}和{last}" if first else last

    def joined(self, sentences: Sequence[str]) -> str:
        return "".join(sentences)

    def sentence(self, text: str) -> str:
        if text[-1] in "。？":
            return text[:-1] if text[-1] == "？" and self.chance(0.1) else text
        return f"{text}。" if self.chance(0.4) else text

    def article(self, word: str) -> str:
        return word

    def shape(self, shape: str) -> str:
        return self.words.SHAPES[shape][0]

    def name(self, thing: Thing) -> str:
        return f"{self.canonical('COLOURS', thing.colour)}的{self.shape(thing.shape)}"


WORDINGS: dict[str, type[Wording]] = {"en": English, "zh": Chinese}


def wording(language: str, rng: np.random.Generator) -> Wording:
    """Raises ValueError where the language is neither "en" nor "zh"."""
    if language not in WORDINGS:
        raise ValueError(f"language={language!r}: must be one of {', '.join(WORDINGS)}")
    return WORDINGS[language](rng)
