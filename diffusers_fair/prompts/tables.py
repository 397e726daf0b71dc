"""Tables of targets: prompt or subject -> target shares, for example from labour statistics."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from diffusers_fair import strict_json
from diffusers_fair.paths import expand
from diffusers_fair.prompts import SPLITS, normalized, prompt_set

Table = Mapping[str, Sequence[float]]


def read_table(path: str | Path, classes: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read a table from a file.

    Args:
        path: CSV file with a header, a first column of prompts or subjects and a column for each
            class; or JSON file with an object of lists of shares, in the order of the classes.
        classes: classes of the attribute.

    Raises:
        ValueError: no such file, or a file that is not such a table.
    """
    path = expand(path)
    if not path.is_file():
        raise ValueError(f"there is no table of targets '{path}': expected a CSV or JSON file")
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"the table of targets '{path}' cannot be read: {error}") from None
    try:
        is_json = path.suffix == ".json"
        rows = dict(strict_json.loads(text)).items() if is_json else _from_csv(text, classes)
        return _by_name((str(name), tuple(map(float, shares))) for name, shares in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"'{path}' is not a table of targets ({error}): expected a CSV file whose columns are "
            f"the prompt or subject and {', '.join(classes)}, or JSON with a list of shares for "
            "each prompt or subject"
        ) from None


def _from_csv(text: str, classes: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    rows = csv.DictReader(text.splitlines())
    head = list(rows.fieldnames or ())
    if sorted(head[1:]) != sorted(classes):
        raise ValueError(f"its columns are {head}")
    for row in rows:
        yield row[head[0]].strip(), [float(row[name]) for name in classes]


def _by_name(rows: Iterable[tuple[str, Sequence[float]]]) -> dict[str, tuple[float, ...]]:
    """Return name -> shares; a name may have two Unicode forms, but only one row.

    Raises:
        ValueError: two rows have the same name.
    """
    table: dict[str, tuple[float, ...]] = {}
    for name, shares in rows:
        name = normalized(name)
        if name in table:
            raise ValueError(f"targets are given twice for '{name}'")
        table[name] = tuple(shares)
    return table


def targets_by_prompt(table: Table, sets: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return prompt -> shares; a subject stands for all prompts of the sets that contain it.

    Args:
        table: prompt, or subject of a prompt set -> shares.
        sets: names or paths of prompt sets; all their splits count.

    Raises:
        ValueError: the table has something that is neither a prompt nor a subject of the sets, or
            the same twice.
    """
    sets = list(sets)
    prompts: dict[str, list[str]] = {}  # prompt or subject -> the prompts that it stands for
    for known in map(prompt_set, sets):
        for subject in (s for split in SPLITS for s in getattr(known, split)):
            whole = [template.replace("{}", subject) for template in known.templates]
            prompts.setdefault(subject, []).extend(whole)
            prompts |= {prompt: [prompt] for prompt in whole}
    by_name = _by_name(table.items())
    for name in by_name:
        if name not in prompts:
            raise ValueError(
                f"targets are given for '{name}', which is neither a prompt nor a subject of "
                f"{', '.join(map(str, sets))}: remove it, or add the prompt set that has it"
            )
    subjects_first = sorted(by_name.items(), key=lambda row: prompts[row[0]] == [row[0]])
    return {prompt: shares for name, shares in subjects_first for prompt in prompts[name]}
