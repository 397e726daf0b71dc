"""Prompt sets: templates filled with subjects in three splits; packaged, or read from a file."""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from diffusers_fair import strict_json
from diffusers_fair.paths import expand

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class PromptSet:
    """Templates, and subjects in three splits.

    Raises:
        ValueError: a template without the placeholder `{}` for the subject.
    """

    name: str
    """Name of a packaged set, or path of a file."""
    templates: tuple[str, ...]
    """Phrases with the placeholder `{}` for the subject."""
    train: tuple[str, ...]
    """Subjects to fine-tune on."""
    validation: tuple[str, ...]
    """Subjects to choose a checkpoint by."""
    test: tuple[str, ...]
    """Subjects to evaluate on."""

    def __post_init__(self) -> None:
        """Check that every template has the placeholder."""
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(
                    f"a template of prompt set '{self.name}' has no {{}} for the subject: "
                    f"'{template}'"
                )

    def prompts(self, split: str) -> list[str]:
        """Fill every template with every subject of a split, template by template.

        Args:
            split: "train", "validation" or "test".

        Raises:
            ValueError: no such split, or a split without subjects.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split '{split}': expected one of {', '.join(SPLITS)}")
        subjects = getattr(self, split)
        if not subjects:
            filled = ", ".join(s for s in SPLITS if getattr(self, s))
            raise ValueError(
                f"prompt set '{self.name}' has no {split} prompts; it has prompts for: {filled}"
            )
        return [t.replace("{}", subject) for t in self.templates for subject in subjects]


def normalized(text: str) -> str:
    """Compose Unicode characters (NFC), so that texts that look the same are the same."""
    return unicodedata.normalize("NFC", text)


def prompt_set(name: str | Path) -> PromptSet:
    """Load a packaged prompt set, or read one from a file.

    A file is text with one prompt per line, or JSON (`*.json`) in the format of the packaged sets:
    the lists `templates`, `train`, `validation` and `test`, and optionally `source`. A split may be
    missing. A text file has no splits: each of them contains all lines, so validating or evaluating
    on the file that an adapter was trained on uses no unseen prompts.

    Args:
        name: one of `names()`, or the path of a UTF-8 file.

    Raises:
        ValueError: no such prompt set or file, or a file that is not text or JSON, contains no
            prompts or contains a subject twice.
    """
    if str(name) in names():
        return _packaged(str(name))
    path = expand(name)
    if path.is_file():
        return _json_file(path) if path.suffix == ".json" else _text_file(path)
    nearest = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.0)[0]
    raise ValueError(
        f"no prompt set and no file is called '{name}': did you mean '{nearest}'? "
        f"Packaged sets: {', '.join(names())}; or give a text file with one prompt a line, or JSON"
    )


def names() -> list[str]:
    """List the names of the packaged prompt sets."""
    folder = files(__package__).iterdir()
    return sorted(Path(f.name).stem for f in folder if f.name.endswith(".json"))


def _packaged(name: str) -> PromptSet:
    text = files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    lists = {key: tuple(strict_json.loads(text)[key]) for key in ("templates", *SPLITS)}
    return PromptSet(name=name, **lists)


def _json_file(path: Path) -> PromptSet:
    keys = ("templates", *SPLITS)
    try:
        data = strict_json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"'{path}' is not JSON: {error}") from None
    unknown = set(data) - {"source", *keys} if isinstance(data, dict) else {type(data).__name__}
    if unknown:
        raise ValueError(
            f"'{path}': expected an object with the keys source, {', '.join(keys)}; "
            f"got {', '.join(sorted(unknown))}"
        )
    for key in keys:
        texts = data.setdefault(key, [])
        if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"'{path}': expected a list of texts as '{key}', got {texts!r:.80}")
    lists = {key: tuple(normalized(text.strip()) for text in data[key]) for key in keys}
    subjects = [subject.lower() for split in SPLITS for subject in lists[split]]
    if not lists["templates"] or not subjects:
        raise ValueError(
            f"'{path}' holds no prompts: expected templates (\"{{}}\" if the subjects are whole "
            "prompts) and subjects in at least one split"
        )
    for subject, times in Counter(subjects).items():
        if times > 1:
            raise ValueError(
                f"'{path}' has '{subject}' {times} times: keep it in one split, so that "
                "held-out prompts stay unseen"
            )
    _refuse_duplicates(path, lists["templates"])
    return PromptSet(name=str(path), **lists)


def _text_file(path: Path) -> PromptSet:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' is not UTF-8 text: expected one prompt a line") from None
    prompts = tuple(normalized(line.strip()) for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts: expected one prompt a line")
    _refuse_duplicates(path, prompts)
    return PromptSet(str(path), ("{}",), train=prompts, validation=prompts, test=prompts)


def _refuse_duplicates(path: Path, texts: Sequence[str]) -> None:
    for text, times in Counter(texts).items():
        if times > 1:
            raise ValueError(f"'{path}' has '{text}' {times} times: leave out the copies")
