"""JSON without the numbers that only Python reads."""

import math

import pytest

from diffusers_fair import strict_json


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_written(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json.dumps({"a": [value]})


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_not_read(text):
    with pytest.raises(ValueError, match=f"{text} is not a finite number"):
        strict_json.loads(f'{{"a": [{text}]}}')


def test_what_is_written_is_read():
    value = {"a": [1, 0.25, None, "é"]}
    assert strict_json.loads(strict_json.dumps(value, ensure_ascii=False)) == value
