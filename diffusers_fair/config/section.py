"""Base class of the recipe sections, and value types that several sections use."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
TwoOrMore = Annotated[int, Field(ge=2, strict=True)]


def _number_or_auto(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (is_number and 0 < value < math.inf):
        raise ValueError(f"expected a number of GB above 0, auto or null, got {value!r}")
    return value


Gigabytes = Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)]


def _equal_weights(sets: Any) -> Any:
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
