"""Turns validation errors of pydantic into one sentence for the user."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def sentences(error: ValidationError, schema: type[BaseModel]) -> str:
    """Describe every problem, except those of a section that has a more specific problem inside.

    Args:
        error: raised by `schema`.
        schema: schema of the whole recipe, for the names of the known keys.
    """
    problems = error.errors()
    locations = [problem["loc"] for problem in problems]
    return "; ".join(
        _sentence(problem, schema)
        for problem in problems
        if not any(inner[: len(problem["loc"])] == problem["loc"] != inner for inner in locations)
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is spelled most like `word`, or list all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"


def _sentence(problem: Any, schema: type[BaseModel]) -> str:
    """Describe one problem: key, expected, got."""
    key, context = ".".join(map(str, problem["loc"])), problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            *parents, word = problem["loc"]
            return f"unknown key '{key}': {nearest(str(word), _known_keys(parents, schema))}"
        case "missing":
            return f"'{key}' is missing"
        case "value_error":
            return f"{key}: {context['error']}".removeprefix(": ")
        case "string_too_short":
            return f"{key}: expected a text, got an empty one"
        case "too_short":
            return f"{key}: expected {context['min_length']} or more, got {len(problem['input'])}"
        case "model_type":
            return f"{key}: expected a section of keys and values, got {problem['input']!r}"
    expected = re.sub(r", (unable|got|not) .*", "", problem["msg"])
    return f"{key}: {expected.replace('Input should be', 'expected')}, got {problem['input']!r}"


def _known_keys(parents: Sequence[str | int], schema: type[BaseModel]) -> list[str]:
    """List the keys of the section at this path."""
    section = schema
    for name in parents:
        if name in section.model_fields:  # not a list index, nor a name that the user chose
            annotation = section.model_fields[str(name)].annotation
            types = (t for t in (annotation, *get_args(annotation)) if isinstance(t, type))
            section = next(t for t in types if issubclass(t, BaseModel))
    return list(section.model_fields)
