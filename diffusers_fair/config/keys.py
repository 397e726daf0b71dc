"""The list of all recipe keys, with their documentation and defaults, read from the schema."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from diffusers_fair import strict_json
from diffusers_fair.config.schema import RunConfig


@dataclass(frozen=True)
class RecipeKey:
    """A key of a recipe, or a section of keys."""

    path: str
    """Path in dots, as in an override. `0` stands for any position, `NAME` for any name."""
    documentation: str
    """Documentation on one line."""
    default: str
    """`required`, or `default: ` and the default value in YAML; empty for a section."""

    @property
    def is_section(self) -> bool:
        """Whether the key is a section, whose keys follow in the list."""
        return not self.default


def recipe_keys() -> list[RecipeKey]:
    """List all recipe keys in the order of the schema, each section before its keys."""
    extended = (
        "Recipe to start from, whose values this one replaces: a file, relative to the folder of "
        "this recipe, or a shipped recipe."
    )
    return [RecipeKey("extends", extended, _text(None)), *_keys(RunConfig, "")]


def _keys(section: type[BaseModel], prefix: str) -> Iterator[RecipeKey]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner, infix = _inner_section(field.annotation)
        is_plain_section = inner is not None and type(None) not in get_args(field.annotation)
        if inner is None or field.description:
            default = "" if is_plain_section and not infix else _default(field)
            yield RecipeKey(path, _one_line(field.description), default)
        if inner is not None:
            if infix or not field.description:
                yield RecipeKey(f"{path}{infix}", _one_line(inspect.getdoc(inner)), "")
            yield from _keys(inner, f"{path}{infix}.")


def _inner_section(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """Find the section that a value holds, and the path from the value to the section."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    infix = {tuple: ".0", dict: ".NAME"}.get(get_origin(annotation), "")
    for argument in get_args(annotation):
        inner, rest = _inner_section(argument)
        if inner is not None:
            return inner, infix + rest
    return None, ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    adapter: TypeAdapter[Any] = TypeAdapter(field.annotation or Any)
    return _text(adapter.dump_python(field.default, mode="json", exclude_defaults=True))


def _text(default: Any) -> str:
    return f"default: {strict_json.dumps(default)}"


def _one_line(documentation: str | None) -> str:
    return " ".join((documentation or "").split())
