"""English that asks for well-known classes, by the name of the class; more than training uses."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FILE = "classes.json"


@dataclass(frozen=True)
class Entry:
    """How English asks for one class."""

    words: tuple[str, ...] = ()
    """Before the subject: "a female chef"."""
    nouns: tuple[str, ...] = ()
    """In the place of "person": "a chef, a woman"."""
    plurals: tuple[str, ...] = ()
    """For recognition alone."""
    sentences: tuple[str, ...] = ()
    """At the end: "a chef, she is smiling"."""
    implied: tuple[str, ...] = ()
    """Whole prompts that leave little choice without naming the class."""
    implied_test: tuple[str, ...] = ()
    """The same, never trained on."""


def entry(name: str) -> Entry:
    """The entry of a class; case does not matter. An empty one for a class that is not in it."""
    return _entries().get(name.casefold(), Entry())


@cache
def _entries() -> dict[str, Entry]:
    data = json.loads(files(__package__).joinpath(FILE).read_text("utf-8"))
    data.pop("source")
    return {
        name.casefold(): Entry(**{key: tuple(texts) for key, texts in lists.items()})
        for name, lists in data.items()
    }
