"""Captions for training the testbed, with the labels of the images they describe."""

from dataclasses import dataclass, field

import numpy as np
from data import Portraits

from diffusers_fair.testbed import world

# kind of caption -> share
KINDS = {
    "neutral": 0.36,
    "explicit": 0.30,
    "person": 0.04,
    "other": 0.06,
    "styled": 0.05,
    "sport": 0.03,
    "sentence": 0.04,
    "two": 0.01,
    "empty scene": 0.02,
    "nothing": 0.09,
}
# the last part of the training has more captions that name attributes
KINDS_LAST = {
    **KINDS,
    "neutral": 0.26,
    "explicit": 0.40,
    "person": 0.06,
    "nothing": 0.08,
    "other": 0.05,
}
OTHER = (
    "a portrait of a {}",
    "a {} at work",
    "a picture of a {}",
    "{}",
    "the face of a {}",
    "photo of a {} looking at the camera",
)
STYLED = ("an {} of a {}", "a {} of the face of a {}, a person")
TWO = ("a photo of two people, {}s", "two {}s", "a {} with another person")
EMPTY = ("{}", "a photo of {} without anybody", "an empty scene: {}", "{}, nobody there")
NOUNS = {"female": "woman", "male": "man"}


@dataclass
class Caption:
    """A text, and the labels of its image; no labels if the text leaves open who is shown."""

    text: str
    kind: str = "portrait"
    style: str = "photo"
    family: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


def sample_classes(subject: world.Subject, g: np.random.Generator) -> dict[str, str]:
    """Sample the classes of a person from the distribution of the subject."""
    return {
        n: a.classes[g.choice(len(a.classes), p=subject.odds[n])]
        for n, a in world.ATTRIBUTES.items()
    }


def sample_caption(g: np.random.Generator, kinds: dict[str, float] = KINDS) -> Caption:
    """Sample a caption from the mixture of kinds."""
    kind = g.choice(list(kinds), p=list(kinds.values()))
    occupations = world.occupations()
    occupation = occupations[g.integers(len(occupations))]
    any_classes = {n: a.classes[g.integers(len(a.classes))] for n, a in world.ATTRIBUTES.items()}
    if kind == "nothing":
        return Caption("", "empty" if g.random() < 0.04 else "portrait")
    if kind == "two":
        return Caption(str(g.choice(TWO)).format(occupation.text), "pair", family=occupation.family)
    if kind == "empty scene":
        family = str(g.choice(list(world.families())))
        return Caption(
            str(g.choice(EMPTY)).format(world.families()[family]["place"]), "empty", family=family
        )
    if kind == "person":
        named = {n: c for n, c in any_classes.items() if g.random() < 0.7}
        words = [str(g.choice(world.WORDS[named[n]])) for n in ("age", "race") if n in named]
        noun = NOUNS[named["gender"]] if "gender" in named else "person"
        return Caption("a photo of a " + " ".join([*words, noun]), labels=any_classes)
    if kind == "sport":
        subject = world.sports()[g.integers(len(world.sports()))]
        text = f"a person playing {subject.text}"
    elif kind == "sentence":
        subject = world.sentences()[g.integers(len(world.sentences()))]
        text = subject.text
    else:
        subject, text = occupation, occupation.text
    labels = sample_classes(subject, g)
    caption = Caption(text, family=subject.family, labels=labels)
    if kind == "explicit":
        named = [n for n in ("age", "race", "gender") if g.random() < 0.6] or ["gender"]
        labels.update({n: any_classes[n] for n in named})
        words = [str(g.choice(world.WORDS[labels[n]])) for n in named]
        caption.text = world.NEUTRAL.format(" ".join([*words, text]))
    elif kind == "neutral":
        caption.text = world.NEUTRAL.format(text)
    elif kind == "other":
        caption.text = str(g.choice(OTHER)).format(text)
    elif kind == "styled":
        caption.style = str(g.choice(["oil painting", "pencil sketch"]))
        caption.text = str(g.choice(STYLED)).format(caption.style, text)
    elif kind == "sentence":
        caption.style = world.style_of(text)
    return caption


class Rows:
    """Finds training images with given labels."""

    def __init__(self, portraits: Portraits):
        columns = {"gender": "gender1", "race": "race1", "age": "age_group1"}
        at = portraits.labels
        self.cells: dict[tuple, list[int]] = {}
        for i in portraits.where(split="train"):
            classes = [at[c][i] if at["kind"][i] == "portrait" else None for c in columns.values()]
            for family in (at["family"][i], None):
                for who in (tuple(classes), (None,) * 3):
                    key = (at["kind"][i], family, *who)
                    self.cells.setdefault(key, []).append(int(i))

    def sample(self, caption: Caption, g: np.random.Generator) -> int:
        """Sample the row of an image that the caption describes."""
        who = [caption.labels.get(n) for n in world.ATTRIBUTES]
        rows = self.cells[(caption.kind, caption.family, *who)]
        return rows[g.integers(len(rows))]


def every_text() -> list[str]:
    """List texts that together contain every word of every caption."""
    places = [facts["place"] for facts in world.families().values()]
    words = [w for group in world.WORDS.values() for w in group]
    subjects = [s.text for s in world.occupations() + world.sports() + world.sentences()]
    plurals = [f"{o.text}s" for o in world.occupations()]
    frames = [
        *OTHER,
        *STYLED,
        *TWO,
        *EMPTY,
        world.NEUTRAL,
        "a person playing {}",
        "oil painting",
        "pencil sketch",
    ]
    nouns = [*NOUNS.values(), "person"]
    return [t.replace("{}", " ") for t in [*frames, *places, *words, *subjects, *plurals, *nouns]]
