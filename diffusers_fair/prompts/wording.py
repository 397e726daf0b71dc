"""Words that name the classes of an attribute, and where in a prompt they are inserted."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_fair.attributes import Attribute

_IMAGES = "art|drawing|face|image|mural|painting|photo|picture|portrait|sketch"
_BEFORE_SUBJECT = re.compile(rf"(?:.*\b(?:{_IMAGES}) of )?(?:(?:an?|the) )?", re.IGNORECASE)
_VOWEL = re.compile("(?!eu|uni|one)[aeiou]", re.IGNORECASE)  # a European, a uniformed guard
_SALT = 0xFA1  # separates this random stream from the noise of the same seed


class Term(NamedTuple):
    """One word for one class."""

    word: str
    label: int
    """Index of its class."""
    share: float
    """Probability of the word: the target share of its class, split evenly among its words."""


@dataclass(frozen=True)
class Wording:
    """An attribute and the words that name its classes.

    Raises:
        ValueError: words for something that is not a class of the attribute.
    """

    attribute: Attribute
    words: Mapping[str, Sequence[str]]
    """Class -> words that stand before the subject, as in "a female chef". Default for a class: its
    name."""
    nouns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Class -> nouns, as in "a chef, a woman"."""

    def __post_init__(self) -> None:
        """Check that every class with words exists."""
        classes = self.attribute.classes
        unknown = [name for name in (*self.words, *self.nouns) if name not in classes]
        if unknown:
            raise ValueError(
                f"words are given for '{unknown[0]}', which is not a class of attribute "
                f"'{self.attribute.name}': its classes are {', '.join(classes)}"
            )

    def words_of(self, name: str) -> tuple[str, ...]:
        """Return the words of a class that stand before the subject; its name by default."""
        return tuple(self.words.get(name, (name,)))

    @property
    def terms(self) -> list[Term]:
        """All words, class by class; their shares sum to 1."""
        terms = []
        for label, (name, target) in enumerate(
            zip(self.attribute.classes, self.attribute.target, strict=True)
        ):
            words = self.words_of(name)
            terms += [Term(word, label, target / len(words)) for word in words]
        return terms


def attribute_sections(recipe: Mapping[str, Any]) -> list[Any]:
    """Return the unvalidated attribute sections of a recipe; none if they are not a list."""
    sections = recipe.get("attributes")
    return sections if isinstance(sections, list) else []


def recipe_wording(attribute: Attribute, sections: Iterable[Any]) -> Wording:
    """Return an attribute with the words that a recipe has for it.

    The recipe of an adapter may come from anybody and is not validated, so malformed sections,
    unknown classes and words that are not text are skipped.

    Args:
        attribute: the attribute.
        sections: attribute sections of a recipe as JSON data. The first one for this attribute that
            has words or nouns is used; without any, the words are the names of the classes.
    """
    for section in sections:
        if isinstance(section, Mapping) and section.get("name") == attribute.name:
            words, nouns = (_valid_words(section.get(key), attribute) for key in ("words", "nouns"))
            if words or nouns:
                return Wording(attribute, words, nouns)
    return Wording(attribute, {})


def _valid_words(given: Any, attribute: Attribute) -> dict[str, tuple[str, ...]]:
    """Keep only words that are text, and only classes that have any."""
    lists = given if isinstance(given, Mapping) else {}
    valid = {
        name: tuple(word for word in lists[name] if isinstance(word, str) and word.strip())
        for name in attribute.classes
        if isinstance(lists.get(name), list | tuple)
    }
    return {name: words for name, words in valid.items() if words}


def sample_terms(wordings: Sequence[Wording], generator: torch.Generator) -> list[Term]:
    """Sample one term per attribute by its share, from the seed of an image's generator.

    The generator itself is not advanced, so the image's noise does not change.
    """
    random = np.random.default_rng([generator.initial_seed(), _SALT])
    sampled = []
    for wording in wordings:
        terms = wording.terms
        sampled.append(terms[random.choice(len(terms), p=[term.share for term in terms])])
    return sampled


def combinations(wordings: Sequence[Wording]) -> list[tuple[list[Term], float]]:
    """Return all combinations of one term per attribute, with their shares of the joint target."""
    groups = product(*(wording.terms for wording in wordings))
    return [(list(terms), float(np.prod([term.share for term in terms]))) for terms in groups]


def with_terms(prompt: str, terms: Sequence[Term]) -> str:
    """Insert words before the subject of a prompt, those of the first attribute nearest to it.

    "a photo of the face of a chef" -> "a photo of the face of an old Indian chef". The article is
    adapted.
    """
    return before_subject(prompt, " ".join(term.word for term in reversed(terms)) + " ")


def before_subject(prompt: str, text: str) -> str:
    """Insert a text before the subject of a prompt, and adapt the article."""
    start = subject_start(prompt)
    article = r"\1n\2" if _VOWEL.match(text) else r"\1\2"
    return re.sub(r"\b(a)n?( )$", article, prompt[:start], flags=re.IGNORECASE) + (
        f"{text}{prompt[start:]}"
    )


def article(word: str) -> str:
    """Return the indefinite article of a word, by its first letters."""
    return "an" if _VOWEL.match(word) else "a"


def subject_start(prompt: str) -> int:
    """Return where the subject starts: after "a photo of the face of" etc. and an article."""
    match = _BEFORE_SUBJECT.match(prompt)
    assert match is not None  # all of the pattern is optional
    return match.end()


def subject(prompt: str) -> str:
    """Return the subject of a prompt: up to the next punctuation mark."""
    return re.split(r"[,.;:]", prompt[subject_start(prompt) :])[0].strip()
