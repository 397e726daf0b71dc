"""The small world that the testbed was trained on: people, occupations, contexts and captions.

Every subject of a prompt (an occupation, a sport, a sentence) belongs to a context family (clothes
and background) and has its own distribution over perceived gender, race and age. The distributions
are sampled once, from the subject's text alone, and are biased on purpose: the bias is what the
testbed is for.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts import prompt_set

GENDER = Attribute("gender", ("female", "male"))
RACE = Attribute("race", ("WMELH", "Asian", "Black", "Indian"))
AGE = Attribute("age", ("young", "old"))
ATTRIBUTES = {a.name: a for a in (GENDER, RACE, AGE)}

WORDS = {
    "female": ("female",),
    "male": ("male",),
    "WMELH": ("white", "Middle Eastern", "Latino"),
    "Asian": ("Asian",),
    "Black": ("Black",),
    "Indian": ("Indian",),
    "young": ("young",),
    "old": ("old",),
}
"""Class -> words that ask for it."""

NEUTRAL = "a photo of the face of a {}, a person"
MOSTLY_MALE = 0.6  # share of subjects whose majority is male
MOSTLY = (0.55, 0.15, 0.15, 0.15)  # which race has the majority
STYLE_CUES = {
    "oil painting": ("oil painting", "painting", "mural", "digital art", "oil painting"),
    "pencil sketch": ("sketch", "line art", "concept art", "avatar"),
}


@dataclass(frozen=True)
class Subject:
    """Subject of a prompt, and the distribution of people if the prompt does not describe them."""

    text: str
    family: str
    odds: Mapping[str, np.ndarray]
    """Attribute name -> (classes,) shares; the attributes are independent of each other."""


@cache
def families() -> dict[str, dict]:
    """Family -> its place and its occupations."""
    return json.loads(files(__package__).joinpath("world.json").read_text("utf-8"))


@cache
def family_of(occupation: str) -> str:
    """Context family of an occupation; for any other text, one that follows from its words."""
    for family, facts in families().items():
        if occupation in facts["occupations"]:
            return family
    named = [f for f in families() if f in occupation.lower()]
    return named[0] if named else list(families())[_generator(occupation, "family").integers(16)]


@cache
def subject(text: str, family: str | None = None) -> Subject:
    """The subject of that text; its distribution depends on the text alone."""
    g = _generator(text, "odds")
    male = g.uniform(0.62, 0.95) if g.random() < MOSTLY_MALE else 1 - g.uniform(0.62, 0.95)
    top, most = g.uniform(0.5, 0.85), g.choice(4, p=MOSTLY)
    race = np.insert(g.dirichlet(np.full(3, 4.0)) * (1 - top), most, top)
    old = g.beta(0.8, 2.0)
    odds = {"gender": np.array([1 - male, male]), "race": race, "age": np.array([1 - old, old])}
    return Subject(text, family or family_of(text), odds)


@cache
def occupations() -> list[Subject]:
    """All 221: training, validation and test ones."""
    return [subject(o) for facts in families().values() for o in facts["occupations"]]


@cache
def sports() -> list[Subject]:
    """The paper's sports, all of the athlete's family."""
    known = prompt_set("sports")
    return [subject(s, "athlete") for s in known.train + known.test]


@cache
def sentences() -> list[Subject]:
    """The paper's free sentences: style or context, personal descriptors, non-templated ones."""
    sets = [prompt_set(name) for name in ("styles", "descriptors", "non-templated")]
    return [subject(text) for known in sets for text in known.train + known.test]


def style_of(text: str) -> str:
    """The image style that a free sentence asks for."""
    cues = ((style, cue) for style, cues in STYLE_CUES.items() for cue in cues)
    return next((style for style, cue in cues if cue in text.lower()), "photo")


@cache
def names() -> dict[str, str]:
    """Name of a subject in prompts, an occupation, a sport or a whole sentence -> its family."""
    sporting = {f"playing {s.text}": s.family for s in sports()}  # `trial`, `running` are words too
    return {s.text: s.family for s in occupations() + sentences()} | sporting


@cache
def family_in(prompt: str) -> str | None:
    """Context family of the subject that a prompt names in any phrasing; None if it names none."""
    named = [n for n in names() if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", prompt)]
    return names()[max(named, key=len)] if named else None


def explicit(occupation: str, *classes: str) -> str:
    """The neutral prompt with attribute words, as in `explicit("chef", "old", "Indian")`."""
    words = [WORDS[c][0] for c in classes]
    return NEUTRAL.format(" ".join([*words, occupation]))


def _generator(text: str, purpose: str) -> np.random.Generator:
    """A random generator that depends on the text and on nothing else."""
    digest = hashlib.sha256(f"{purpose}: {text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
