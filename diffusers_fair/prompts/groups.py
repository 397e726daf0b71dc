"""Prompts that an adapter has to leave as the base model draws them, in three groups.

- named: words name a class of an attribute, before the subject, behind it or as a noun
- implied: words leave little choice without naming the class, as "a queen"
- untouched: nobody is to be seen, or nothing is said at all

For training they are made of the words and prompts that training knows; for evaluation of those and
of others, and each prompt tells whether its words are among training's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle, islice, zip_longest
from math import lcm

from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.lexicon import entry
from diffusers_fair.prompts.wording import Wording, article, before_subject, subject

NAMED, IMPLIED, UNTOUCHED = GROUPS = ("named", "implied", "untouched")
PER_ATTRIBUTE = 16  # named prompts of an attribute alone in an evaluation, over its classes
NEGATIVES = ("blurry, low quality", "text, watermark", "deformed, extra fingers")


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt that leaves an adapter nothing to change."""

    text: str
    asks: Mapping[str, str] = field(default_factory=dict)
    """Attribute -> the class that the words ask for."""
    negative: str = ""
    """The negative prompt."""
    unseen: bool = False
    """Whether its words are none of training's."""


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of one kind, to measure how far an adapter leaves them alone."""

    name: str
    """One of `GROUPS`."""
    prompts: tuple[KeptPrompt, ...]
    images_per_prompt: int = 4


def evaluation_groups(
    prompts: Sequence[str],
    trained: Sequence[Wording],
    *,
    untouched: str = UNTOUCHED,
    split: str = "test",
    images_per_prompt: int = 4,
) -> tuple[PromptGroup, ...]:
    """The groups of an evaluation: words of training and others, on the prompts that it measures.

    Args:
        prompts: neutral ones, which the words are put into.
        trained: each attribute with the words that training knows.
        untouched: prompt set of prompts that show nobody.
        split: of that set.
        images_per_prompt: images of each prompt.

    Returns:
        Those of the three groups that have prompts.
    """
    pools = {
        NAMED: named_prompts(prompts, trained, PER_ATTRIBUTE, further=True),
        IMPLIED: implied_prompts(trained, further=True),
        UNTOUCHED: untouched_prompts(untouched, split),
    }
    return tuple(
        PromptGroup(name, _distinct(found), images_per_prompt)
        for name, found in pools.items()
        if found
    )


def _distinct(prompts: Sequence[KeptPrompt]) -> tuple[KeptPrompt, ...]:
    """Each once: few neutral prompts and words meet again."""
    found: dict[tuple[str, str], KeptPrompt] = {}
    for prompt in prompts:
        found.setdefault((prompt.text, prompt.negative), prompt)
    return tuple(found.values())


def named_prompts(
    prompts: Sequence[str],
    wordings: Sequence[Wording],
    per_attribute: int,
    *,
    further: bool = False,
) -> tuple[KeptPrompt, ...]:
    """Prompts with words that ask for a class of one attribute or of two at once.

    Args:
        prompts: neutral ones; every class gets the same of them, so that words alone tell them
            apart.
        wordings: each attribute with training's words.
        per_attribute: prompts of an attribute alone, spread over its classes; half as many for
            every two attributes.
        further: whether the lexicon's words come in, too, alternating with training's.
    """
    found: list[KeptPrompt] = []
    for wording in wordings:
        classes = wording.attribute.classes
        count = -(-per_attribute // len(classes))
        for name in classes:
            found += _of_class(prompts, {wording.attribute.name: name}, wording, count, further)
    for pair in combinations(wordings, 2):
        found += _pairs(pair, cycle(prompts), per_attribute // 2)
    return tuple(found)


def _of_class(
    prompts: Sequence[str], asks: Mapping[str, str], wording: Wording, count: int, further: bool
) -> Iterator[KeptPrompt]:
    """Prompts and phrases for a class, each in turn, until all combinations have come."""
    (name,) = asks.values()
    phrases = _phrases(wording, name, further)
    for i in range(count):
        shift = i // lcm(len(phrases), len(prompts))  # then the same pairs would come again
        phrase = phrases[(i + shift) % len(phrases)]
        yield KeptPrompt(phrase.put(prompts[i % len(prompts)]), asks, unseen=phrase.unseen)


def implied_prompts(
    wordings: Sequence[Wording], *, further: bool = False
) -> tuple[KeptPrompt, ...]:
    """Prompts that imply a class; with `further` also those that are kept from training."""
    return tuple(
        KeptPrompt(text, {wording.attribute.name: name}, unseen=unseen)
        for wording in wordings
        for name in wording.attribute.classes
        for texts, unseen in ((entry(name).implied, False), (entry(name).implied_test, True))
        for text in texts
        if further or not unseen
    )


def untouched_prompts(name: str, split: str) -> tuple[KeptPrompt, ...]:
    """The empty prompt and prompts that show nobody, a few once more with a negative prompt."""
    shown = prompt_set(name).prompts(split)
    negative = zip(shown, NEGATIVES, strict=False)
    return tuple(KeptPrompt(text) for text in ("", *shown)) + tuple(
        KeptPrompt(text, negative=words) for text, words in negative
    )


@dataclass(frozen=True)
class _Phrase:
    """A word of a class and how it goes into a prompt."""

    word: str
    form: str
    unseen: bool

    def put(self, prompt: str) -> str:
        """The prompt with the word in it."""
        match self.form:
            case "before":
                return before_subject(prompt, f"{self.word} ")
            case "behind":
                return _as_person(prompt, f"{self.word} person")
            case "noun":
                return _as_person(prompt, self.word)
            case "noun before":
                name = subject(prompt)
                return before_subject(prompt, f"{self.word}, {article(name)} ")
        return f"{prompt}, {self.word}"  # a sentence


FORMS = (("words", "before"), ("nouns", "noun"), ("words", "behind"), ("nouns", "noun before"))


def _phrases(wording: Wording, name: str, further: bool) -> list[_Phrase]:
    """Phrases for a class, its forms in turn; training's words alternate with others."""
    own = {"words": wording.words_of(name), "nouns": tuple(wording.nouns.get(name, ()))}
    seen = _in_turn([[_Phrase(w, form, False) for w in own[kind]] for kind, form in FORMS])
    if not further:
        return seen
    known = entry(name)
    more = {
        kind: [w for w in getattr(known, kind) if w not in words] for kind, words in own.items()
    }
    unseen = _in_turn(
        [
            *([_Phrase(w, form, True) for w in more[kind]] for kind, form in FORMS),
            [_Phrase(sentence, "sentence", True) for sentence in known.sentences],
        ]
    )
    return _alternating(seen, unseen) if unseen else seen


def _in_turn(lists: Sequence[Sequence[_Phrase]]) -> list[_Phrase]:
    """The first of each list, then the second of each, and so on."""
    return [phrase for row in zip_longest(*lists) for phrase in row if phrase is not None]


def _alternating(seen: Sequence[_Phrase], unseen: Sequence[_Phrase]) -> list[_Phrase]:
    """One of either in turn, until the longer list is through."""
    count = max(len(seen), len(unseen))
    pairs = zip(islice(cycle(seen), count), islice(cycle(unseen), count), strict=True)
    return [phrase for pair in pairs for phrase in pair]


def _pairs(
    pair: tuple[Wording, Wording], neutral: Iterator[str], count: int
) -> Iterator[KeptPrompt]:
    """Prompts that ask for a class of each of two attributes, by training's words."""
    one, other = pair
    asked = cycle([(x, y) for x in one.attribute.classes for y in other.attribute.classes])
    for turn, (x, y) in enumerate(islice(asked, count)):
        words = (_turn(other.words_of(y), turn), _turn(one.words_of(x), turn))
        yield KeptPrompt(
            before_subject(next(neutral), " ".join(words) + " "),
            {one.attribute.name: x, other.attribute.name: y},
        )


def _turn(words: Sequence[str], turn: int) -> str:
    return words[turn % len(words)]


def _as_person(prompt: str, noun: str) -> str:
    """The prompt with its "a person", if it has one, told as somebody else; else with one more."""
    told = f"{article(noun)} {noun}"
    changed, times = re.subn(r"\ban? person\b", told, prompt, count=1)
    return changed if times else f"{prompt}, {told}"


# ---- what a prompt asks for ----------------------------------------------------------------------


def vocabulary(wordings: Sequence[Wording]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Attribute -> class -> everything that names it: a recipe's words and the lexicon's."""
    return {
        wording.attribute.name: {
            name: tuple(dict.fromkeys([*wording.words_of(name), *_named(wording, name)]))
            for name in wording.attribute.classes
        }
        for wording in wordings
    }


def _named(wording: Wording, name: str) -> Iterator[str]:
    known = entry(name)
    yield from (*wording.nouns.get(name, ()), *known.words, *known.nouns, *known.plurals)
    yield from dict.fromkeys(sentence.split()[0] for sentence in known.sentences)  # she, he


def classes_named(
    text: str, words: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, list[str]]:
    """Attribute -> its classes that a prompt names; only attributes of which it names any.

    Args:
        text: a prompt.
        words: as `vocabulary` gives them; whole words count, in any case.
    """
    found = {
        attribute: [name for name, listed in classes.items() if _has_any(text, listed)]
        for attribute, classes in words.items()
    }
    return {attribute: names for attribute, names in found.items() if names}


def requested_classes(
    text: str, words: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, str]:
    """Attribute -> the class that a prompt asks for; one that names two is left out."""
    found = classes_named(text, words)
    return {attribute: names[0] for attribute, names in found.items() if len(names) == 1}


def _has_any(text: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in words)
