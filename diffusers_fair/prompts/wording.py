"""Attributes in words: what asks for a class in a prompt, and where in the prompt it goes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_fair.attributes import Attribute

PICTURES = "art|drawing|face|image|mural|painting|photo|picture|portrait|sketch"
SUBJECT = re.compile(rf"(?:.*\b(?:{PICTURES}) of )?(?:(?:an?|the) )?", re.IGNORECASE)
VOWEL = re.compile("(?!eu|uni|one)[aeiou]", re.IGNORECASE)  # a European, a uniformed guard
SALT = 0xFA1  # keeps what is drawn here apart from the noise of the same generator


class Term(NamedTuple):
    """One word for one class."""

    word: str
    label: int
    """Index of its class."""
    share: float
    """How often to use it: the class's target, split evenly among its words."""


@dataclass(frozen=True)
class Wording:
    """An attribute and the words that ask for its classes.

    Raises:
        ValueError: words for something that is no class of the attribute.
    """

    attribute: Attribute
    words: Mapping[str, Sequence[str]]
    """Class -> words that stand before the subject, as in "a female chef"; a class that is left out
    is asked for by its name."""
    nouns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Class -> nouns, as in "a chef, a woman"."""

    def __post_init__(self) -> None:
        """Check that every class with words exists."""
        classes = self.attribute.classes
        unknown = [name for name in (*self.words, *self.nouns) if name not in classes]
        if unknown:
            raise ValueError(
                f"attribute '{self.attribute.name}' has no class '{unknown[0]}' to have words for: "
                f"its classes are {', '.join(classes)}"
            )

    def words_of(self, name: str) -> tuple[str, ...]:
        """The words of a class that stand before the subject; its name, if it has none."""
        return tuple(self.words.get(name, (name,)))

    @property
    def terms(self) -> list[Term]:
        """All words, class by class; their shares sum to 1."""
        found = []
        for label, (name, target) in enumerate(
            zip(self.attribute.classes, self.attribute.target, strict=True)
        ):
            words = self.words_of(name)
            found += [Term(word, label, target / len(words)) for word in words]
        return found


def attribute_sections(recipe: Mapping[str, Any]) -> list[Any]:
    """The attribute sections of a recipe from a file, unchecked; none if they are not a list."""
    sections = recipe.get("attributes")
    return sections if isinstance(sections, list) else []


def recipe_wording(attribute: Attribute, sections: Iterable[Any]) -> Wording:
    """An attribute with the words that recipes have for it.

    The recipe of an adapter comes from others and is not validated, so malformed sections, classes
    that the attribute does not have, and words that are not text are skipped.

    Args:
        attribute: the attribute.
        sections: attribute sections of recipes, as JSON has them. The first one of that name with
            words or nouns counts. Without any, the words are the names of the classes.
    """
    for section in sections:
        if isinstance(section, Mapping) and section.get("name") == attribute.name:
            words, nouns = (_valid_words(section.get(key), attribute) for key in ("words", "nouns"))
            if words or nouns:
                return Wording(attribute, words, nouns)
    return Wording(attribute, {})


def _valid_words(given: Any, attribute: Attribute) -> dict[str, tuple[str, ...]]:
    """Class -> those of its words that are text; a class without any is left out."""
    lists = given if isinstance(given, Mapping) else {}
    found = {
        name: tuple(word for word in lists[name] if isinstance(word, str) and word.strip())
        for name in attribute.classes
        if isinstance(lists.get(name), list | tuple)
    }
    return {name: words for name, words in found.items() if words}


def draw_terms(wordings: Sequence[Wording], generator: torch.Generator) -> list[Term]:
    """One term of each attribute by its share, decided by the seed of an image's generator.

    The generator itself is not advanced: the image's noise stays what it is without the method.
    """
    random = np.random.default_rng([generator.initial_seed(), SALT])
    drawn = []
    for wording in wordings:
        terms = wording.terms
        drawn.append(terms[random.choice(len(terms), p=[term.share for term in terms])])
    return drawn


def combinations(wordings: Sequence[Wording]) -> list[tuple[list[Term], float]]:
    """Every combination of one term of each attribute, with its share of the joint target."""
    groups = product(*(wording.terms for wording in wordings))
    return [(list(terms), float(np.prod([term.share for term in terms]))) for terms in groups]


def with_terms(prompt: str, terms: Sequence[Term]) -> str:
    """The prompt with the words before its subject, those of the first attribute nearest to it.

    "a photo of the face of a chef" -> "a photo of the face of an old Indian chef"; the article is
    made to fit.
    """
    return before_subject(prompt, " ".join(term.word for term in reversed(terms)) + " ")


def before_subject(prompt: str, text: str) -> str:
    """The prompt with a text before its subject; the article is made to fit."""
    start = subject_start(prompt)
    article = r"\1n\2" if VOWEL.match(text) else r"\1\2"
    return re.sub(r"\b(a)n?( )$", article, prompt[:start], flags=re.IGNORECASE) + (
        f"{text}{prompt[start:]}"
    )


def article(word: str) -> str:
    """The indefinite article of a word, by its first letters."""
    return "an" if VOWEL.match(word) else "a"


def subject_start(prompt: str) -> int:
    """Where the subject begins: behind "a photo of the face of" and the like, and an article."""
    found = SUBJECT.match(prompt)
    assert found is not None  # all of the pattern is optional
    return found.end()


def subject(prompt: str) -> str:
    """The subject alone: up to the next comma or stop."""
    return re.split(r"[,.;:]", prompt[subject_start(prompt) :])[0].strip()
