"""What is said of scenes, held to the graph: the texts are read back by a small reader of their own, then judged."""

import re
import string

import numpy as np
import pytest

from uniworld.data.scenes import questions, words_en, words_zh
from uniworld.data.scenes.captions import PROMPT_KINDS, long_caption, prompt_of
from uniworld.data.scenes.compositions import COMPOSITIONS, make_composition
from uniworld.data.scenes.descriptions import describe
from uniworld.data.scenes.edits import KINDS, KINDS_OF_THINGS, STEPS, edit_mask, edits_of, make_edit
from uniworld.data.scenes.graph import (
    BACKGROUNDS,
    COLOURS,
    LIGHTS,
    MATERIALS,
    PLAIN,
    POSES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    is_held_out,
    pose_name,
)
from uniworld.data.scenes.phrases import parse_phrases
from uniworld.data.scenes.prompts import KIND_WEIGHTS, make_prompt
from uniworld.data.scenes.sampling import sample_scene
from uniworld.data.scenes.wording import WORDINGS, wording

LANGUAGES = ("en", "zh")
TABLES = {"en": words_en, "zh": words_zh}
SAID = {"shape": "SHAPES", "colour": "COLOURS", "material": "MATERIALS", "size": "SIZES"}
# Clearly beside each other, in the numbers of the floor: 0.25 of x, 0.2 of z.
BESIDE = {
    "left of": lambda a, b: b.x - a.x > 0.25,
    "right of": lambda a, b: a.x - b.x > 0.25,
    "in front of": lambda a, b: b.z - a.z > 0.2,
    "behind": lambda a, b: a.z - b.z > 0.2,
}
FURTHEST = {"left": "left of", "right": "right of", "front": "in front of", "back": "behind"}


def synonyms(language):
    """Every word for an attribute -> (attribute, its key)."""
    found = {}
    for attribute, table in SAID.items():
        for key, options in getattr(TABLES[language], table).items():
            for option in options:
                for word in (option,) if isinstance(option, str) else option:
                    assert found.setdefault(word, (attribute, key)) == (attribute, key), word
    return found


READERS = {
    language: (
        re.compile("|".join(sorted(map(re.escape, synonyms(language)), key=len, reverse=True))),
        synonyms(language),
    )
    for language in LANGUAGES
}


def read(text, language):
    """The attributes that a text names, and the extreme place where it names one."""
    pattern, meaning = READERS[language]
    if language == "en":
        pattern = re.compile(rf"(?<![\w-])(?:{pattern.pattern})(?![\w-])")
    attributes = {}
    for word in pattern.findall(text):
        attribute, key = meaning[word]
        assert attributes.setdefault(attribute, key) == key, f"{text}: two {attribute}s"
    extremes = [
        key
        for key, options in TABLES[language].EXTREMES.items()
        for option in options
        if option.replace("{}", "").strip() in text
    ]
    assert len(set(extremes)) <= 1, text
    return attributes, (extremes or [None])[0]


def meant(text, scene, language):
    """The things of the scene that a text can mean."""
    attributes, extreme = read(text, language)
    fitting = [i for i, thing in enumerate(scene.things) if all(getattr(thing, k) == v for k, v in attributes.items())]
    if extreme is None:
        return fitting
    beyond = BESIDE[FURTHEST[extreme]]
    return [i for i in fitting if all(i == j or beyond(scene.things[i], scene.things[j]) for j in fitting)]


def scenes(num, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    return [(sample_scene(rng, split=split), rng) for _ in range(num)]


def test_several_hundred_templates_two_to_one():
    numbers = {language: sum(map(len, cls.phrases.values())) for language, cls in WORDINGS.items()}
    assert numbers["en"] >= 400 and numbers["zh"] >= 200, numbers
    assert 1.5 < numbers["en"] / numbers["zh"] < 2.5, numbers


def test_both_languages_say_the_same():
    """The same sections, and in each the same slots, but for those that only some templates need."""
    english, chinese = (WORDINGS[language].phrases for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    free = {"style", "style_name", "background", "background_at", "background_to", "there_is", "colour", "a_colour"}
    free |= {"material", "a_material"}
    for section in english:
        slots = [
            {field for _, field, _, _ in string.Formatter().parse(template) if field} - free
            for template in (*english[section], *chinese[section])
        ]
        assert all(s == slots[0] for s in slots), section


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_words_for_everything(language):
    words = TABLES[language]
    keys = {
        SHAPES: ("SHAPES",),
        tuple(COLOURS): ("COLOURS",),
        MATERIALS: ("MATERIALS", "FINISHES"),
        SIZES: ("SIZES", "SIZES_SAID"),
        STYLES: ("STYLES", "STYLE_NAMES"),
        LIGHTS: ("LIGHTS",),
        tuple(POSES): ("POSES",),
        (*BACKGROUNDS, PLAIN): ("BACKGROUNDS", "BACKGROUNDS_AT"),
        BACKGROUNDS: ("BACKGROUNDS_TO",),
    }
    for expected, tables in keys.items():
        for table in tables:
            assert set(getattr(words, table)) == set(expected), table


def test_sections_are_checked():
    with pytest.raises(ValueError, match="'a': stands twice"):
        parse_phrases("# a\nx\n# a\ny")
    with pytest.raises(ValueError, match="'x': stands twice"):
        parse_phrases("# a\nx\nx")
    with pytest.raises(ValueError, match="'b': is empty"):
        parse_phrases("# a\nx\n# b")
    with pytest.raises(ValueError, match="before the first section"):
        parse_phrases("x")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_description_means_one_thing(language):
    told = 0
    for scene, rng in scenes(150):
        words = wording(language, rng)
        for i in range(len(scene.things)):
            without = words.pick([(), ("colour",), ("shape",)])
            description = describe(scene, i, rng, without=without)
            if description is not None:
                text = words.the(description)
                assert meant(text, scene, language) == [i], (text, scene)
                assert not set(without) & set(read(text, language)[0]), text
                told += 1
    assert told > 350


def test_nothing_is_said_where_things_are_alike():
    rng = np.random.default_rng(0)
    ball = Thing(shape="ball", colour="red", x=-0.1)
    near = Scene(things=(ball, Thing(shape="ball", colour="red", x=0.1)))  # neither clearly to the left
    far = Scene(things=(ball, Thing(shape="ball", colour="red", x=0.5)))
    assert describe(near, 0, rng) is None
    assert {describe(far, 0, rng).extreme for _ in range(20)} == {"left"}
    assert {describe(far, 1, rng).extreme for _ in range(20)} == {"right"}
    assert describe(far, 0, rng, place=False) is None


# --- edits


ENLARGED = re.compile(r"bigger|larger|enlarge|up|increase|grow|大")
SHRUNK = re.compile(r"smaller|shrink|down|reduce|decrease|小")
SIDES = {
    "left": re.compile(r"left|左"),
    "right": re.compile(r"right|右"),
    "front": re.compile(r"front|closer|forward|towards|nearer|前|近"),
    "back": re.compile(r"back|away|distance|后|远"),
    "middle": re.compile(r"middle|cent|中间"),
}
LIGHT_WORDS = {
    "left": re.compile(r"left|左"),
    "right": re.compile(r"right|右"),
    "front": re.compile(r"front|viewer|前|正面"),
    "warm": re.compile(r"warm|sun|暖"),
    "cool": re.compile(r"cool|cold|blue|冷"),
    "dim": re.compile(r"dim|down|darker|lower|暗"),
}


def only_differs(a, b, *fields):
    """Whether two things are equal but for these fields, and differ in one of them."""
    same = {f: getattr(b, f) for f in fields}
    return a != b and type(a)(**{**vars(a), **same}) == b


def check_thing_of_change(edit, change, slots):
    before, after = edit.before.things[change.before], edit.after.things[change.after]
    if change.kind == "replace":
        new, _ = read(slots["a"], edit.language)
        assert all(getattr(after, k) == v for k, v in new.items()) and "shape" in new
        assert after.shape != before.shape and (after.x, after.z, after.size) == (before.x, before.z, before.size)
        assert after.colour in (new.get("colour"), before.colour)
    elif change.kind in ("colour", "material"):
        assert only_differs(before, after, change.kind)
        tables = TABLES[edit.language]
        table = tables.COLOURS if change.kind == "colour" else tables.FINISHES
        assert slots[change.kind] in table[getattr(after, change.kind)]
    elif change.kind == "size":
        assert only_differs(before, after, "size")
        grown = SIZES.index(after.size) > SIZES.index(before.size)
        named = slots["size"] in TABLES[edit.language].SIZES_SAID[after.size] and slots["size"] in edit.instruction
        assert named or (ENLARGED if grown else SHRUNK).search(edit.instruction), edit.instruction
    elif change.kind == "pose":
        assert (
            only_differs(before, after, "pose") and slots["pose"] in TABLES[edit.language].POSES[pose_name(after.pose)]
        )
    elif change.kind == "move":
        assert only_differs(before, after, "x", "z") and SIDES[change.value].search(edit.instruction)
        assert BESIDE[FURTHEST[change.value]](after, before), change
    elif change.kind == "move_by":
        other = edit.after.things[change.other]
        assert slots["relation"] in TABLES[edit.language].RELATIONS[change.value]
        assert BESIDE[change.value](after, other) and not BESIDE[change.value](before, other)
        assert only_differs(before, after, "x", "z")
    else:
        assert change.kind == "swap"
        a, b = edit.before.things[change.before], edit.before.things[change.other]
        c, d = edit.after.things[change.before], edit.after.things[change.other]
        assert (a.x, a.z, b.x, b.z) == (d.x, d.z, c.x, c.z)


def check_change(edit, change, slots):
    """The words of one change are true of before and after."""
    for name, text in slots.items():
        if name in ("the", "the_1", "the_2"):
            index = change.other if name == "the_2" or change.kind == "add" else change.before
            if change.kind == "add":  # counted after; new things come last, and hybrids may have removed one
                index = edit.before.things.index(edit.after.things[index])
            assert meant(text, edit.before, edit.language) == [index], (edit.instruction, edit.before)
            assert text.lower() in edit.instruction.lower()
    if change.kind == "add":
        new = edit.after.things[change.after]
        assert new not in edit.before.things
        attributes, _ = read(slots["a"], edit.language)
        assert {"shape", "colour"} <= attributes.keys()
        assert all(getattr(new, k) == v for k, v in attributes.items())
        if change.other is not None:
            assert BESIDE[change.value](new, edit.after.things[change.other])
            assert slots["relation"] in TABLES[edit.language].RELATIONS[change.value]
        elif change.value:
            x, z = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "back": (0, 1), "middle": (0, 0)}[change.value]
            assert new.x * x > 0.36 or (new.z - 0.5) * z > 0.1 or (x == z == 0 and abs(new.x) < 0.36)
            assert slots["side"] in TABLES[edit.language].SIDES[change.value]
    elif change.kind == "remove":
        assert edit.before.things[change.before] not in edit.after.things
    elif change.kind == "extract":
        assert edit.after.things == (edit.before.things[change.before],) and edit.after.background == "plain"
    elif change.kind == "light":
        assert edit.after.light == change.value != edit.before.light
        assert LIGHT_WORDS[change.value].search(edit.instruction), edit.instruction
    elif change.kind in ("background", "style"):
        value = getattr(edit.after, change.kind)
        assert value == change.value != getattr(edit.before, change.kind)
        tables = TABLES[edit.language]
        names = (
            ("BACKGROUNDS", "BACKGROUNDS_AT", "BACKGROUNDS_TO")
            if change.kind == "background"
            else ("STYLES", "STYLE_NAMES")
        )
        said = [word for name in names for word in getattr(tables, name)[value]]
        assert any(word in edit.instruction for word in said), edit.instruction
    else:
        check_thing_of_change(edit, change, slots)


def check_rest(edit):
    """What the changes do not name is as it was."""
    for before, after in edit.kept:
        assert edit.before.things[before] == edit.after.things[after]
    changed = {c.after for c in edit.changes if c.after is not None} | {
        c.other for c in edit.changes if c.kind == "swap"
    }
    if edit.changes[0].kind != "extract":
        assert changed.isdisjoint(after for _, after in edit.kept)
        assert len(changed) + len(edit.kept) == len(edit.after.things)
    for field in ("background", "light", "style", "seed"):
        changes_it = field.replace("seed", "background")  # a new background has a texture of its own
        named = any(c.kind == changes_it for c in edit.changes) or edit.changes[0].kind == "extract" or edit.second
        assert named or getattr(edit.before, field) == getattr(edit.after, field), field


@pytest.mark.parametrize("kind", KINDS)
def test_instructions_are_true(kind):
    seen = set()
    for number in range(60):
        language, split = LANGUAGES[number % 2], ("train", "held-out")[number % 3 == 0]
        edit = make_edit(kind, np.random.default_rng((7, number)), split=split, language=language)
        assert edit.kind == kind and len(edit.changes) == (2 if kind == "hybrid" else 1)
        for place, change in enumerate(edit.changes, 1):
            slots = dict(edit.parts)
            if kind == "hybrid":
                slots = {k.removesuffix(f"_{place}"): v for k, v in slots.items() if k.endswith(f"_{place}")}
            check_change(edit, change, slots)
            seen.add(change.kind)
        check_rest(edit)
        assert "{" not in edit.instruction and "  " not in edit.instruction
    assert seen == set(KINDS[kind])


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_edits_of_a_scene_are_true(language):
    found = []
    for number in range(8):
        rng = np.random.default_rng((11, number))
        before = make_edit("adjust", rng, language=language).before
        others = edits_of(before, wording(language, rng), 10, language=language)
        assert all(edit.before == before and edit.language == language for edit in others)
        found += others
    for edit in found:
        check_change(edit, edit.changes[0], dict(edit.parts))
        check_rest(edit)
    assert len(found) > 50 and {edit.kind for edit in found} == set(KINDS_OF_THINGS)


def test_every_step_makes_some_kind():
    assert {step for kind in KINDS.values() for step in kind} == STEPS.keys()


def test_compositions_are_true():
    seen = set()
    for number in range(80):
        edit = make_composition(np.random.default_rng(number), language=LANGUAGES[number % 2])
        (change,) = edit.changes
        slots = dict(edit.parts)
        after = None if change.after is None else edit.after.things[change.after]
        source = slots.get("the", slots.get("the_2"))
        if source is not None:
            (index,) = meant(source, edit.second, edit.language)
            taken = edit.second.things[index]
        if "the_1" in slots:
            assert meant(slots["the_1"], edit.before, edit.language) == [change.before]
        if change.kind in ("add", "replace"):
            assert taken == after or only_differs(taken, after, "x", "z")
        elif change.kind == "colour":
            assert after.colour == taken.colour != edit.before.things[change.before].colour
            assert "colour" not in read(source, edit.language)[0]
        else:
            assert getattr(edit.after, change.kind) == getattr(edit.second, change.kind)
            assert getattr(edit.after, change.kind) != getattr(edit.before, change.kind)
        check_rest(edit)
        seen.add(change.kind)
    assert len(seen) == len(COMPOSITIONS)


def test_edit_mask():
    before, after = np.zeros((2, 16, 16, 3), np.uint8)
    after[2, 3, 1] = 1
    mask = edit_mask(before, after)
    assert mask.dtype == bool and mask.sum() == 1 and mask[2, 3]
    with pytest.raises(ValueError, match=r"after: has shape \(8, 8, 3\)"):
        edit_mask(before, after[:8, :8])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="kind='paint': must be one of add, remove"):
        make_edit("paint", np.random.default_rng(0))
    with pytest.raises(ValueError, match="language='fr': must be one of en, zh"):
        make_edit("add", np.random.default_rng(0), language="fr")


# --- prompts


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_prompts_are_true(kind):
    for number in range(40):
        language, rng = LANGUAGES[number % 2], np.random.default_rng((3, number))
        scene, prompt = make_prompt(kind, rng, wording(language, rng), "train", language)
        things = scene.things
        for want in prompt.wants:
            fitting = [
                t
                for t in things
                if all(v in (None, getattr(t, k)) for k, v in vars(want.description).items() if k != "extreme")
            ]
            assert len(fitting) == want.number if want.exactly else len(fitting) >= want.number
        words = TABLES[language]
        if prompt.background:
            names = (*words.BACKGROUNDS[scene.background], *words.BACKGROUNDS_AT[scene.background])
            assert any(name in prompt.text for name in names), prompt.text
        if scene.style != "photo":
            assert prompt.style == scene.style and any(n in prompt.text.lower() for n in words.STYLES[scene.style])
        if kind in ("single object", "colors"):
            assert (
                len(things) == 1
                and read(prompt.text.lower().replace("green meadow", ""), language)[0]["shape"] == things[0].shape
            )
        if kind == "colors":
            assert prompt.wants[0].description.colour == things[0].colour
        if kind == "counting":
            assert {t.shape for t in things} == {prompt.wants[0].description.shape}
            number_word = words.NUMBERS[len(things)]
            assert prompt.wants[0].exactly and number_word in prompt.text.lower()
        if kind == "position":
            a, b = ([t for t in things if t.shape == want.description.shape][0] for want in prompt.wants)
            assert BESIDE[prompt.relation](a, b)
            assert any(name in prompt.text for name in words.RELATIONS[prompt.relation])
        if kind == "attribute binding":
            (a, b), described = things, [want.description for want in prompt.wants]
            assert a.colour != b.colour and a.shape != b.shape
            assert [(d.shape, d.colour) for d in described] == [(t.shape, t.colour) for t in things]


def test_a_prompt_tells_wrong_scenes():
    rng = np.random.default_rng(0)
    red, blue = Thing(shape="ball", colour="red", x=-0.6), Thing(shape="cube", colour="blue", x=0.6)
    scene = Scene(things=(red, blue))
    words = wording("en", rng)
    position = prompt_of("position", scene, words, "en")
    assert position.holds(scene)
    swapped = scene.with_thing(0, x=0.6).with_thing(1, x=-0.6)
    assert not position.holds(swapped)
    binding = prompt_of("attribute binding", scene, words, "en")
    assert binding.holds(scene) and not binding.holds(scene.with_thing(0, colour="blue").with_thing(1, colour="red"))
    counting = prompt_of("counting", Scene(things=(red, red)), words, "en")
    assert counting.holds(Scene(things=(red, red))) and not counting.holds(Scene(things=(red, red, red)))
    assert set(PROMPT_KINDS) < set(KIND_WEIGHTS)
    with pytest.raises(ValueError, match="kind='poem'"):
        prompt_of("poem", scene, words, "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_everything(language):
    for scene, rng in scenes(60, seed=5):
        words = wording(language, rng)
        caption = prompt_of("caption", scene, words, language)
        for text in (caption.text, long_caption(scene, words)):
            for thing in scene.things:
                assert any(w in text.lower() for w in TABLES[language].COLOURS[thing.colour])
        assert caption.holds(scene) and sum(want.number for want in caption.wants) == len(scene.things)


# --- questions


def answer_of(question, scene):
    """The answer by the graph, worked out from what is asked."""

    def fitting(description):
        named = {k: v for k, v in vars(description).items() if v is not None and k != "extreme"}
        found = [t for t in scene.things if all(getattr(t, k) == v for k, v in named.items())]
        if description.extreme and question.kind != "count":
            beyond = BESIDE[FURTHEST[description.extreme]]
            found = [t for t in found if all(t is o or beyond(t, o) for o in found)]
        return found

    groups = [fitting(description) for description in question.about]
    yes_no = {True: "yes", False: "no"}
    if question.kind == "count":
        return str(len(groups[0]))
    if question.kind == "exists":
        return yes_no[bool(groups[0])]
    if question.kind == "more":
        return yes_no[len(groups[0]) > len(groups[1])]
    if question.kind in ("background", "style"):
        return getattr(scene, question.kind)
    assert all(len(group) == 1 for group in groups), question
    first = groups[0][0]
    second = groups[1][0] if len(groups) > 1 else None
    size = {name: i for i, name in enumerate(SIZES)}
    if question.kind in ("colour", "shape", "material"):
        return getattr(first, question.kind)
    if question.kind == "where":
        return "left" if first.x < -0.36 else "right" if first.x > 0.36 else "middle"
    if question.kind == "relation":
        holds = BESIDE[question.relation](first, second)
        assert holds or BESIDE[questions.OPPOSITES[question.relation]](first, second), "neither is clear"
        return yes_no[holds]
    if question.kind == "what_at":
        (found,) = [t for t in scene.things if t is not first and BESIDE[question.relation](t, first)]
        return f"{found.colour} {found.shape}"
    if question.kind in ("bigger", "smaller"):
        order = sorted((first, second), key=lambda t: size[t.size])
        found = order[question.kind == "bigger"]
        return f"{found.colour} {found.shape}"
    if question.kind == "is_bigger":
        return yes_no[size[first.size] > size[second.size]]
    assert question.kind == "same_colour"
    return yes_no[first.colour == second.colour]


def localized(value, kind, language):
    """The answer's one form in a language."""
    words = TABLES[language]
    if kind in ("count",):
        return value
    if value in ("yes", "no"):
        return words.YES_NO[value == "no"]
    if " " in value and kind in ("what_at", "bigger", "smaller"):
        colour, shape = (localized(part, k, language) for part, k in zip(value.split(), ("colour", "shape")))
        return f"{colour} {shape}" if language == "en" else f"{colour}的{shape}"
    tables = {
        "colour": "COLOURS",
        "shape": "SHAPES",
        "material": "FINISHES",
        "where": "SIDES",
        "background": "BACKGROUND_NAMES",
        "style": "STYLE_NAMES",
    }
    first = getattr(words, tables[kind])[value][0]
    return first if isinstance(first, str) else first[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_right(language):
    asked, answers = {}, {}
    for scene, rng in scenes(220, seed=9):
        for question in questions.converse(scene, wording(language, rng), "train", 5):
            asked[question.kind] = asked.get(question.kind, 0) + 1
            if question.kind.startswith("caption"):
                continue
            assert question.value == answer_of(question, scene), (question, scene)
            assert question.answer == localized(question.value, question.kind, language)
            if question.value in ("yes", "no"):
                answers.setdefault(question.kind, []).append(question.value == "yes")
            if question.kind == "exists" and question.value == "no":
                assert not is_held_out(question.about[0].shape, question.about[0].colour)
            if len(question.about) == 1:
                attributes, _ = read(question.text.lower(), language)
                description = question.about[0]
                assert attributes == {k: getattr(description, k) for k in SAID if getattr(description, k)}
    assert asked.keys() == questions.KINDS.keys()
    assert answers.keys() == YES_NO_KINDS


YES_NO_KINDS = {"exists", "relation", "is_bigger", "same_colour", "more"}


def test_yes_and_no_are_balanced():
    found = {kind: [] for kind in YES_NO_KINDS}
    for scene, rng in scenes(500, seed=11):
        for kind in YES_NO_KINDS:
            question = questions.ask(kind, scene, wording("en", rng), "train")
            found[kind] += [] if question is None else [question.value == "yes"]
    for kind, values in found.items():  # four standard deviations of a fair coin
        assert len(values) > 100 and abs(np.mean(values) - 0.5) < 2 / len(values) ** 0.5, (kind, np.mean(values))


def test_conversations_do_not_repeat_themselves():
    for scene, rng in scenes(60, seed=2):
        turns = questions.converse(scene, wording("en", rng), "train", 4)
        topics = [(t.kind, tuple(d.matches(scene) for d in t.about)) for t in turns]
        assert len(set(topics)) == len(topics) <= 4


def test_same_generator_same_words():
    for make in (lambda rng: make_edit("hybrid", rng, language="zh"), lambda rng: make_composition(rng)):
        assert make(np.random.default_rng(4)) == make(np.random.default_rng(4))
