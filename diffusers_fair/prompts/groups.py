"""Kept prompts: prompts whose images an adapter must not change. There are three groups.

- named: the prompt names a class of an attribute, before the subject, after it or as a noun
- implied: the prompt implies a class without naming it, such as "a queen"
- untouched: the prompt shows nobody, or is empty

Training uses the words of the recipe. Evaluation adds words of the lexicon, and marks the prompts
with words that training did not use as unseen.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, cycle, islice, zip_longest
from math import lcm

from diffusers_fair.prompts import normalized, prompt_set
from diffusers_fair.prompts.lexicon import entry
from diffusers_fair.prompts.wording import Wording, article, before_subject, subject

NAMED, IMPLIED, UNTOUCHED = GROUPS = ("named", "implied", "untouched")
PER_ATTRIBUTE = 16  # named prompts per attribute in an evaluation, over all its classes
_NEGATIVES = ("blurry, low quality", "text, watermark", "deformed, extra fingers")


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt whose images an adapter must not change."""

    text: str
    expected_classes: Mapping[str, str] = field(default_factory=dict)
    """Attribute -> class that the images should show."""
    negative: str = ""
    """The negative prompt."""
    unseen: bool = False
    """Whether training uses none of the words that name or imply a class."""


@dataclass(frozen=True)
class PromptGroup:
    """Kept prompts of one kind, on which an evaluation measures side effects."""

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
    per_attribute: int = PER_ATTRIBUTE,
) -> tuple[PromptGroup, ...]:
    """Make the prompt groups of an evaluation, with the words of training and of the lexicon.

    Args:
        prompts: neutral prompts, into which the words are inserted.
        trained: each attribute with the words that training uses.
        untouched: name of the prompt set that shows nobody.
        split: split of that set.
        images_per_prompt: images per prompt.
        per_attribute: named prompts per attribute.

    Returns:
        The groups that have prompts.
    """
    pools = {
        NAMED: named_prompts(prompts, trained, per_attribute, include_unseen=True),
        IMPLIED: implied_prompts(trained, include_unseen=True),
        UNTOUCHED: untouched_prompts(untouched, split),
    }
    return tuple(
        PromptGroup(name, _distinct(pool), images_per_prompt)
        for name, pool in pools.items()
        if pool
    )


def _distinct(prompts: Sequence[KeptPrompt]) -> tuple[KeptPrompt, ...]:
    """Remove duplicates, which occur if there are few neutral prompts and words."""
    distinct: dict[tuple[str, str], KeptPrompt] = {}
    for prompt in prompts:
        distinct.setdefault((prompt.text, prompt.negative), prompt)
    return tuple(distinct.values())


def named_prompts(
    prompts: Sequence[str],
    wordings: Sequence[Wording],
    per_attribute: int,
    *,
    include_unseen: bool = False,
) -> tuple[KeptPrompt, ...]:
    """Make prompts that name a class of one attribute, or of each of two attributes.

    Args:
        prompts: neutral prompts. Every class uses the same ones, so that prompts of different
            classes differ only in these words.
        wordings: each attribute with the words that training uses.
        per_attribute: prompts per attribute, spread over its classes; half as many per pair of
            attributes.
        include_unseen: whether to alternate with words of the lexicon, which training does not use.
    """
    named: list[KeptPrompt] = []
    for wording in wordings:
        classes = wording.attribute.classes
        count = -(-per_attribute // len(classes))
        for name in classes:
            named += _of_class(
                prompts, {wording.attribute.name: name}, wording, count, include_unseen
            )
    for pair in combinations(wordings, 2):
        named += _pairs(pair, cycle(prompts), per_attribute // 2)
    return tuple(named)


def _of_class(
    prompts: Sequence[str],
    expected_classes: Mapping[str, str],
    wording: Wording,
    count: int,
    include_unseen: bool,
) -> Iterator[KeptPrompt]:
    """Cycle through prompts and phrases for a class; combinations repeat as late as possible."""
    (name,) = expected_classes.values()
    phrases = _phrases(wording, name, include_unseen)
    for i in range(count):
        shift = i // lcm(len(phrases), len(prompts))  # avoids repeating the same pairs
        phrase = phrases[(i + shift) % len(phrases)]
        yield KeptPrompt(
            phrase.insert_into(prompts[i % len(prompts)]), expected_classes, unseen=phrase.unseen
        )


def implied_prompts(
    wordings: Sequence[Wording], *, include_unseen: bool = False
) -> tuple[KeptPrompt, ...]:
    """Return prompts that imply a class, including unseen ones if `include_unseen`."""
    return tuple(
        KeptPrompt(text, {wording.attribute.name: name}, unseen=unseen)
        for wording in wordings
        for name in wording.attribute.classes
        for texts, unseen in ((entry(name).implied, False), (entry(name).implied_test, True))
        for text in texts
        if include_unseen or not unseen
    )


def untouched_prompts(name: str, split: str) -> tuple[KeptPrompt, ...]:
    """Return the empty prompt and prompts that show nobody, some also with a negative prompt."""
    shown = prompt_set(name).prompts(split)
    negative = zip(shown, _NEGATIVES, strict=False)
    return tuple(KeptPrompt(text) for text in ("", *shown)) + tuple(
        KeptPrompt(text, negative=words) for text, words in negative
    )


@dataclass(frozen=True)
class _Phrase:
    """A word for a class, and the form in which it is inserted into a prompt."""

    word: str
    form: str
    unseen: bool

    def insert_into(self, prompt: str) -> str:
        """Return the prompt with the word in it."""
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


_FORMS = (("words", "before"), ("nouns", "noun"), ("words", "behind"), ("nouns", "noun before"))


def _phrases(wording: Wording, name: str, include_unseen: bool) -> list[_Phrase]:
    """Return phrases for a class, alternating with unseen ones if `include_unseen`."""
    trained = {"words": wording.words_of(name), "nouns": tuple(wording.nouns.get(name, ()))}
    seen = _in_turn([[_Phrase(w, form, False) for w in trained[kind]] for kind, form in _FORMS])
    if not include_unseen:
        return seen
    known = entry(name)
    more = {
        kind: [w for w in getattr(known, kind) if w not in words] for kind, words in trained.items()
    }
    unseen = _in_turn(
        [
            *([_Phrase(w, form, True) for w in more[kind]] for kind, form in _FORMS),
            [_Phrase(sentence, "sentence", True) for sentence in known.sentences],
        ]
    )
    return _alternating(seen, unseen) if unseen else seen


def _in_turn(lists: Sequence[Sequence[_Phrase]]) -> list[_Phrase]:
    """Interleave lists: the first of each list, then the second of each, and so on."""
    return [phrase for row in zip_longest(*lists) for phrase in row if phrase is not None]


def _alternating(seen: Sequence[_Phrase], unseen: Sequence[_Phrase]) -> list[_Phrase]:
    """Alternate between two lists until the longer one is used up."""
    count = max(len(seen), len(unseen))
    pairs = zip(islice(cycle(seen), count), islice(cycle(unseen), count), strict=True)
    return [phrase for pair in pairs for phrase in pair]


def _pairs(
    pair: tuple[Wording, Wording], neutral: Iterator[str], count: int
) -> Iterator[KeptPrompt]:
    """Make prompts that name a class of each of two attributes with training's words."""
    one, other = pair
    pairs = cycle([(x, y) for x in one.attribute.classes for y in other.attribute.classes])
    for turn, (x, y) in enumerate(islice(pairs, count)):
        words = (_turn(other.words_of(y), turn), _turn(one.words_of(x), turn))
        yield KeptPrompt(
            before_subject(next(neutral), " ".join(words) + " "),
            {one.attribute.name: x, other.attribute.name: y},
        )


def _turn(words: Sequence[str], turn: int) -> str:
    return words[turn % len(words)]


def _as_person(prompt: str, noun: str) -> str:
    """Replace "a person" in a prompt by a noun; without it, append the noun."""
    phrase = f"{article(noun)} {noun}"
    changed, times = re.subn(r"\ban? person\b", phrase, prompt, count=1)
    return changed if times else f"{prompt}, {phrase}"


# ---- classes that a prompt names -----------------------------------------------------------------


def vocabulary(wordings: Sequence[Wording]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return attribute -> class -> all words that name it, from the recipe and the lexicon."""
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
    """Return attribute -> classes that a prompt names, without attributes that it does not name.

    Args:
        text: a prompt.
        words: as `vocabulary` returns them. Only whole words match, in any case.
    """
    named = {
        attribute: [name for name, listed in classes.items() if _has_any(text, listed)]
        for attribute, classes in words.items()
    }
    return {attribute: names for attribute, names in named.items() if names}


def requested_classes(
    text: str, words: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, str]:
    """Return attribute -> class that a prompt names, without attributes of which it names two."""
    named = classes_named(text, words)
    return {attribute: names[0] for attribute, names in named.items() if len(names) == 1}


def _has_any(text: str, words: Sequence[str]) -> bool:
    text = normalized(text)
    patterns = (rf"(?<!\w){re.escape(normalized(word))}(?!\w)" for word in words)
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)
