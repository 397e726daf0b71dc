"""JSON as the standard has it: Python's own module also writes and reads NaN and Infinity."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Write JSON; takes the options of `json.dumps`.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is not JSON, or a number is not finite.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value
