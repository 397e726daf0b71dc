"""English words and prompts for well-known classes. Training only uses some of them."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from diffusers_fair import strict_json

_FILE = "classes.json"


@dataclass(frozen=True)
class Entry:
    """Words and prompts for one class."""

    words: tuple[str, ...] = ()
    """Words before the subject, as in "a female chef"."""
    nouns: tuple[str, ...] = ()
    """Nouns in place of "person", as in "a chef, a woman"."""
    plurals: tuple[str, ...] = ()
    """Plurals, which are only used to recognise the class in a prompt."""
    sentences: tuple[str, ...] = ()
    """Clauses at the end of a prompt, as in "a chef, she is smiling"."""
    implied: tuple[str, ...] = ()
    """Whole prompts that imply the class without naming it."""
    implied_test: tuple[str, ...] = ()
    """Other such prompts, which training never uses."""


def entry(name: str) -> Entry:
    """Return the entry of a class, in any case; an empty entry for an unknown class."""
    return _entries().get(name.casefold(), Entry())


@cache
def _entries() -> dict[str, Entry]:
    data = strict_json.loads(files(__package__).joinpath(_FILE).read_text("utf-8"))
    data.pop("source")
    return {
        name.casefold(): Entry(**{key: tuple(texts) for key, texts in lists.items()})
        for name, lists in data.items()
    }
