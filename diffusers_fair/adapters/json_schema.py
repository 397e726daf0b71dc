"""Parses untrusted JSON within limits, and checks it against a JSON schema.

Implements the subset of JSON Schema that `format.SCHEMA` needs, as the core installation has
neither pydantic nor jsonschema. There are two additions: the key `errorMessage` holds the error for
an invalid value, and `label` is a format.
"""

import math
import re
from itertools import accumulate
from types import NoneType
from typing import Any

from diffusers_fair import strict_json

Schema = dict[str, Any]

_MAX_DEPTH = 20  # of nested objects and lists
ERROR = "errorMessage"
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": NoneType,
}


# ---- parsing -------------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, max_length: int) -> Any:
    """Parse untrusted JSON of bounded length and depth that holds finite numbers only.

    Args:
        text: JSON as text or UTF-8 bytes.
        where: its name in errors.
        max_length: maximum length in characters or bytes.

    Raises:
        ValueError: it is not JSON, or exceeds the limits.
    """
    try:
        if len(text) > max_length:
            raise ValueError(f"it is longer than {max_length}")
        text = text.decode() if isinstance(text, bytes) else text
        if _depth(text) > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        return strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{where}' is truncated or not acceptable JSON: {error}") from error


def _depth(text: str) -> int:
    """Levels of nested objects and lists."""
    # Removes an unterminated string, too: to look for its end from every quote would take hours.
    bare = re.sub(r'"(?:[^"\\]|\\.?)*(?:"|\Z)', "", text, flags=re.DOTALL)
    return max(accumulate((mark in "[{") - (mark in "]}") for mark in bare), default=0)


# ---- checking ------------------------------------------------------------------------------------


def check(value: Any, schema: Schema, key: str, owner: str = "") -> None:
    """Check untrusted data against a schema.

    Args:
        value: any JSON data.
        schema: schema of the value.
        key: name of the value in errors.
        owner: name in errors of the object that contains it, as in "the rank of COMPONENT".

    Raises:
        ValueError: the first difference.
    """
    problem = _find_problem(value, schema)
    if problem:
        raise ValueError(_sentence(problem, value, schema, key, owner))
    if isinstance(value, dict) and "properties" in schema:
        for name, member in schema["properties"].items():
            if name in value:
                check(value[name], member, name, key)
                key = f"'{value[name]}'" if name == "name" else key  # name in later errors
    elif isinstance(value, dict) and "additionalProperties" in schema:
        for name, member in value.items():
            check(member, schema["additionalProperties"], printable(name), owner)
    elif isinstance(value, list):
        for item in value:
            check(item, schema["items"], schema["items"].get("title", key), owner)


def publish(schema: Any) -> Any:
    """Return the schema without the error messages, which only `check` reads."""
    if isinstance(schema, list):
        return [publish(item) for item in schema]
    if isinstance(schema, dict):
        return {key: publish(value) for key, value in schema.items() if key != ERROR}
    return schema


def printable(value: Any) -> str:
    """Format untrusted data for an error: short and without control characters."""
    text = repr(value)[:100]
    return text if text.isprintable() else ascii(value)[:100]


_KEYS = "expected {key} to have the keys {names}, got {got}"
_TYPE = "'{key}' of {owner} must not be {type}"
_RANGE = "the {key} of {owner} must be from {minimum} to {maximum}, got {got}"
_LABEL = "names and words must be 1 to {maxLength} printable characters, got {got}"


def _sentence(problem: str, value: Any, schema: Schema, key: str, owner: str) -> str:
    got = printable(value)
    if problem is _KEYS:
        got = printable(sorted(value)) if isinstance(value, dict) else type(value).__name__
    about = schema | {"key": key, "owner": owner, "got": got, "type": type(value).__name__}
    is_wrong_scalar = problem is _TYPE and schema["type"] not in ("array", "object")
    sentence = problem if is_wrong_scalar else schema.get(ERROR, problem)
    return sentence.format(**about, names=sorted(schema.get("properties", ())))


def _find_problem(value: Any, schema: Schema) -> str:
    """Check the value without its members; return the default error, or an empty string."""
    if "properties" in schema and value is not None and not _has_keys(value, schema):
        return _KEYS
    if not _has_type(value, schema):
        return _TYPE
    if isinstance(value, list):
        return "" if _has_items(value, schema) else schema[ERROR]
    if schema.get("format") == "label" and value is not None:
        return "" if _is_label(value, schema) else _LABEL
    return "" if _is_in_range(value, schema) else _RANGE


def _has_type(value: Any, schema: Schema) -> bool:
    """Whether the value has a type of the schema; a bool is not a number."""
    if "type" not in schema or isinstance(value, bool):
        return "type" not in schema
    names = schema["type"]
    allowed = [names] if isinstance(names, str) else names
    return any(isinstance(value, _TYPES[name]) for name in allowed)


def _has_keys(value: Any, schema: Schema) -> bool:
    if not isinstance(value, dict) or len(value) < schema.get("minProperties", 0):
        return False
    return set(schema.get("required", ())) <= set(value) <= set(schema["properties"])


def _has_items(value: list[Any], schema: Schema) -> bool:
    """Whether the items are of the right type and number."""
    items = schema["items"]
    fits = "properties" in items or all(_has_type(item, items) for item in value)
    return fits and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)


def _is_label(value: str, schema: Schema) -> bool:
    """Whether the value is one short line that people can read."""
    if not value:
        return "minLength" not in schema
    return bool(value.strip()) and len(value) <= schema["maxLength"] and value.isprintable()


def _is_in_range(value: Any, schema: Schema) -> bool:
    if isinstance(value, str):
        is_choice = value in schema.get("enum", (value,))
        return is_choice and re.fullmatch(schema.get("pattern", ".*"), value, re.DOTALL) is not None
    if isinstance(value, int | float):
        is_above = value > schema.get("exclusiveMinimum", -math.inf)
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return is_above and low <= value <= high and schema.get("const", value) == value
    return True
