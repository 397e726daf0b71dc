"""Base class of the recipe sections, and value types that several sections use."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: Any) -> Any:
    """Refuse what pydantic takes for 0 or 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a valid number, got {value}")
    return value


Number = Annotated[float, BeforeValidator(_refuse_bool)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
TwoOrMore = Annotated[int, Field(ge=2, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
"""Random seed of a training, from which those of the iterations are computed in 64 bits."""


def require_distinct(values: Sequence[str]) -> Sequence[str]:
    """Refuse a list that has a value twice.

    Raises:
        ValueError: it has.
    """
    if len({*values}) < len(values):
        raise ValueError(f"expected different values, got {list(values)}: leave out the copies")
    return values


def _number_or_auto(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (is_number and 0 < value < math.inf):
        raise ValueError(f"expected a number of GB above 0, auto or null, got {value!r}")
    return value


Gigabytes = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]


def _equal_weights(sets: Any) -> Any:
    if isinstance(sets, list) and all(isinstance(name, str) for name in sets):
        require_distinct(sets)
    return dict.fromkeys(sets, 1.0) if isinstance(sets, list) else sets


WeightedSets = Annotated[
    dict[str, PositiveFloat], BeforeValidator(_equal_weights), Field(min_length=1)
]
"""Prompt set -> weight. A list of names gives equal weights."""


def _require_printable(word: str) -> str:
    """Refuse words that `fair_adapter.json` would refuse: they are written to it."""
    if not (word.strip() and word.isprintable()):
        raise ValueError(f"expected printable characters, got {ascii(word)[:100]}")
    return word


_Word = Annotated[str, Field(max_length=300), AfterValidator(_require_printable)]
Words = Annotated[tuple[_Word, ...], Field(min_length=1, max_length=300)]


class Section(BaseModel):
    """A section of a recipe: immutable and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # write the released names of keys
    )
