"""The world of the testbed's training data: people, occupations and contexts.

Every subject of a prompt (an occupation, a sport, a sentence) belongs to a context family (clothes
and background) and has its own distribution over perceived gender, race and age. The distributions
are determined by the subject's text alone. They are biased on purpose, so that there is a bias to
mitigate.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from diffusers_fair import strict_json
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
"""Class -> words that name it in a prompt."""

NEUTRAL = "a photo of the face of a {}, a person"
_MOSTLY_MALE = 0.6  # fraction of subjects with a male majority
_MOSTLY = (0.55, 0.15, 0.15, 0.15)  # fraction of subjects with a majority of each race
_STYLE_CUES = {
    "oil painting": ("oil painting", "painting", "mural", "digital art", "oil painting"),
    "pencil sketch": ("sketch", "line art", "concept art", "avatar"),
}


@dataclass(frozen=True)
class Subject:
    """Subject of a prompt, and the distribution of people that it stands for."""

    text: str
    family: str
    odds: Mapping[str, np.ndarray]
    """Attribute -> shares (classes,); the attributes are independent."""


@cache
def families() -> dict[str, dict]:
    """Return the context families, each with its place and occupations."""
    return strict_json.loads(files(__package__).joinpath("world.json").read_text("utf-8"))


@cache
def family_of(occupation: str) -> str:
    """Return the context family of an occupation; any other text gets one that depends on it."""
    for family, facts in families().items():
        if occupation in facts["occupations"]:
            return family
    named = [f for f in families() if f in occupation.lower()]
    return named[0] if named else list(families())[_generator(occupation, "family").integers(16)]


@cache
def subject(text: str, family: str | None = None) -> Subject:
    """Return the subject of that text; its distribution depends on the text alone."""
    g = _generator(text, "odds")
    male = g.uniform(0.62, 0.95) if g.random() < _MOSTLY_MALE else 1 - g.uniform(0.62, 0.95)
    top, most = g.uniform(0.5, 0.85), g.choice(4, p=_MOSTLY)
    race = np.insert(g.dirichlet(np.full(3, 4.0)) * (1 - top), most, top)
    old = g.beta(0.8, 2.0)
    odds = {"gender": np.array([1 - male, male]), "race": race, "age": np.array([1 - old, old])}
    return Subject(text, family or family_of(text), odds)


@cache
def occupations() -> list[Subject]:
    """Return all 221 occupations, of training, validation and test."""
    return [subject(o) for facts in families().values() for o in facts["occupations"]]


@cache
def sports() -> list[Subject]:
    """Return the paper's sports, all in the athlete's context family."""
    known = prompt_set("sports")
    return [subject(s, "athlete") for s in known.train + known.test]


@cache
def sentences() -> list[Subject]:
    """Return the paper's free sentences: styles, descriptors and non-templated prompts."""
    sets = [prompt_set(name) for name in ("styles", "descriptors", "non-templated")]
    return [subject(text) for known in sets for text in known.train + known.test]


def style_of(text: str) -> str:
    """Return the image style that a free sentence asks for."""
    cues = ((style, cue) for style, cues in _STYLE_CUES.items() for cue in cues)
    return next((style for style, cue in cues if cue in text.lower()), "photo")


@cache
def names() -> dict[str, str]:
    """Map names of subjects in prompts (occupations, sports, whole sentences) to families."""
    sporting = {f"playing {s.text}": s.family for s in sports()}  # `trial`, `running` are words too
    return {s.text: s.family for s in occupations() + sentences()} | sporting


@cache
def family_in(prompt: str) -> str | None:
    """Return the context family of the subject that a prompt names; None if it names none."""
    named = [n for n in names() if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", prompt)]
    return names()[max(named, key=len)] if named else None


def explicit(occupation: str, *classes: str) -> str:
    """Add class words to the neutral prompt, as in `explicit("chef", "old", "Indian")`."""
    words = [WORDS[c][0] for c in classes]
    return NEUTRAL.format(" ".join([*words, occupation]))


def _generator(text: str, purpose: str) -> np.random.Generator:
    """Create a random generator that depends on the text and the purpose alone."""
    digest = hashlib.sha256(f"{purpose}: {text}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
