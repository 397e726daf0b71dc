"""Prompts: templates x subjects in three splits; packaged lists, or a user's own file."""

import difflib
import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class PromptSet:
    """Subjects in three splits, and the templates they are put into.

    Raises:
        ValueError: a template without the place `{}` for the subject.
    """

    name: str
    """Name of a packaged list, or path of the user's file."""
    templates: tuple[str, ...]
    """Phrases with `{}` where the subject goes."""
    train: tuple[str, ...]
    """Subjects to fine-tune on."""
    validation: tuple[str, ...]
    """Subjects to choose a checkpoint by."""
    test: tuple[str, ...]
    """Subjects to evaluate on."""

    def __post_init__(self) -> None:
        """Check that every template has a place for the subject."""
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(
                    f"a template of prompt list '{self.name}' has no {{}} for the subject: "
                    f"'{template}'"
                )

    def prompts(self, split: str) -> list[str]:
        """Every template filled with every subject of a split; template by template.

        Args:
            split: "train", "validation" or "test".

        Raises:
            ValueError: no such split, or a split that this list leaves empty.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split '{split}': expected one of {', '.join(SPLITS)}")
        subjects = getattr(self, split)
        if not subjects:
            filled = ", ".join(s for s in SPLITS if getattr(self, s))
            raise ValueError(
                f"prompt list '{self.name}' has no {split} prompts; it has prompts for: {filled}"
            )
        return [t.replace("{}", subject) for t in self.templates for subject in subjects]


def prompt_set(name: str | Path) -> PromptSet:
    """The packaged list of that name, or the prompts of a user's own file.

    A file is text with one prompt a line, or JSON (`*.json`) of the packaged lists' format: lists
    of texts called templates, train, validation and test, of which a split may be left out, and a
    source. Text has no splits: all three hold all of its lines, so a checkpoint chosen by it, or
    an adapter evaluated on the file it was trained on, has no unseen prompts.

    Args:
        name: one of `names()`, or the path of a UTF-8 file.

    Raises:
        ValueError: no such list and no such file (the nearest known name is given); a file that is
            not text or JSON, holds no prompts, or has a subject twice.
    """
    if str(name) in names():
        return _packaged(str(name))
    path = Path(name)
    if path.is_file():
        return _json_file(path) if path.suffix == ".json" else _text_file(path)
    nearest = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.0)[0]
    raise ValueError(
        f"no prompt list and no file is called '{name}': did you mean '{nearest}'? "
        f"Packaged lists: {', '.join(names())}; or give a text file with one prompt a line, or JSON"
    )


def names() -> list[str]:
    """Names of the packaged lists."""
    folder = files(__package__).iterdir()
    return sorted(Path(f.name).stem for f in folder if f.name.endswith(".json"))


def _packaged(name: str) -> PromptSet:
    text = files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    lists = {key: tuple(json.loads(text)[key]) for key in ("templates", *SPLITS)}
    return PromptSet(name=name, **lists)


def _json_file(path: Path) -> PromptSet:
    keys = ("templates", *SPLITS)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"'{path}' is not JSON: {error}") from None
    unknown = set(found) - {"source", *keys} if isinstance(found, dict) else {type(found).__name__}
    if unknown:
        raise ValueError(
            f"'{path}': expected an object with the keys source, {', '.join(keys)}; "
            f"got {', '.join(sorted(unknown))}"
        )
    for key in keys:
        texts = found.setdefault(key, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"'{path}': expected a list of texts as '{key}', got {texts!r:.80}")
    lists = {key: tuple(text.strip() for text in found[key]) for key in keys}
    subjects = [subject.lower() for split in SPLITS for subject in lists[split]]
    if not lists["templates"] or not subjects:
        raise ValueError(
            f"'{path}' holds no prompts: expected templates (\"{{}}\" if the subjects are whole "
            "prompts) and subjects in at least one split"
        )
    for subject, times in Counter(subjects).items():
        if times > 1:
            raise ValueError(
                f"'{path}' has '{subject}' {times} times: keep it in one split, so that prompts "
                "held out are unseen"
            )
    return PromptSet(name=str(path), **lists)


def _text_file(path: Path) -> PromptSet:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text: expected one prompt a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts: expected one prompt a line")
    return PromptSet(str(path), ("{}",), train=prompts, validation=prompts, test=prompts)
