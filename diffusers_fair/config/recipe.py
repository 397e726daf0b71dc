"""Recipe files: YAML, one recipe extending another, `key=value` overrides."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffusers_fair.config.errors import nearest
from diffusers_fair.paths import expand

RECIPES = Path(__file__).parents[1] / "recipes"
_RENAMED_ATTRIBUTE_KEYS = {"steering": "target_feedback"}  # released name -> name in the schema

Overrides = Iterable[str] | Mapping[str, Any]
"""`key=value` strings with YAML values, or a mapping. Keys are paths with dots."""


def recipes() -> list[str]:
    """List the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str | Path, overrides: Overrides = ()) -> dict[str, Any]:
    """Read a recipe, merge it into the one that it extends, and apply overrides.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: applied in order.

    Raises:
        ValueError: no such recipe, invalid YAML, or an override of a path that does not exist.
    """
    data = _read_extended(_find_recipe(recipe, Path()))
    _rename_keys(data)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    for key, value in pairs:
        _override(data, key.split("."), value, key)
        _rename_keys(data)
    return data


def _rename_keys(data: dict[str, Any]) -> None:
    """Rename released keys to the schema's, after each override so that the last one wins."""
    if isinstance(data.get("attributes"), list):
        data["attributes"] = list(map(_renamed, data["attributes"]))


def _renamed(attribute: Any) -> Any:
    if not isinstance(attribute, dict):
        return attribute
    old = {key: attribute[key] for key in _RENAMED_ATTRIBUTE_KEYS if key in attribute}
    kept = {key: value for key, value in attribute.items() if key not in old}
    return kept | {_RENAMED_ATTRIBUTE_KEYS[key]: value for key, value in old.items()}


def _find_recipe(recipe: Any, folder: Path) -> Path:
    """Find a recipe in a folder, in the working directory, or among the shipped ones."""
    if not isinstance(recipe, str | Path):
        raise ValueError(f"expected the name or the file of a recipe, got {recipe!r}")
    for path in (folder / expand(recipe), expand(recipe)):
        if path.is_file():
            return path
    if str(recipe) in recipes():
        return RECIPES / f"{recipe}.yaml"
    hint = nearest(str(recipe), recipes())
    raise ValueError(f"there is no recipe '{recipe}', neither a file nor shipped: {hint}")


def _read_extended(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and merge it into the one that it extends; `extending` are its extensions."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"recipe '{path}' is not UTF-8 text: save it as UTF-8") from None
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ValueError(f"recipe '{path}' must hold keys and values, got {data!r}")
    path = path.resolve()
    if path in extending:
        raise ValueError(f"recipe '{path}' extends itself: {' -> '.join(map(str, extending))}")
    extended = data.pop("extends", None)
    if extended is None:
        return data
    return _merge(_read_extended(_find_recipe(extended, path.parent), (*extending, path)), data)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge section by section; values and lists of `above` replace those of `below`."""
    sections = {
        key: _merge(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | sections


class _Loader(yaml.SafeLoader):
    """YAML whose numbers and dates are what people read: in YAML 1.1, 010 is 8 and 1:30 is 90."""

    def construct_number(self, node: Any) -> Any:
        """Read decimal numbers with leading zeros; what is no plain number stays a text."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        if re.fullmatch("[-+]?[0-9][0-9_]*", text):
            return int(text.replace("_", ""))
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def construct_text(self, node: Any) -> Any:
        """Read a date as a text."""
        return self.construct_scalar(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_text)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"'{source}' is not YAML: {' '.join(str(error).split())}") from error


def _parse_override(override: str) -> tuple[str, Any]:
    """`a.b=[1, 2]` -> 'a.b', [1, 2]."""
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise ValueError(f"an override must be key=value, got '{override}'")
    return key, _parse_yaml(value, override)


def _override(tree: Any, path: list[str], value: Any, key: str) -> None:
    """Set the value at a path. A mapping is merged into a section, but replaces a list.

    Missing sections are created.
    """
    if isinstance(value, dict) and value and not isinstance(_get(tree, path), list):
        for name, inner in value.items():
            _override(tree, [*path, str(name)], inner, key)
        return
    for i, name in enumerate(path):
        if isinstance(tree, list) and not (name.isdecimal() and int(name) < len(tree)):
            raise ValueError(f"override '{key}': expected 0 to {len(tree) - 1}, got '{name}'")
        if not isinstance(tree, (list, dict)):
            raise ValueError(f"override '{key}': '{'.'.join(path[:i])}' has no keys")
        place: Any = int(name) if isinstance(tree, list) else name
        if i == len(path) - 1:
            if value == {} and isinstance(tree, dict) and isinstance(tree.get(place), dict):
                return  # an empty mapping changes nothing in an existing section
            tree[place] = value
        elif isinstance(tree, dict) and tree.get(place) is None:
            tree[place] = {}
        tree = tree[place]


def _get(tree: Any, path: list[str]) -> Any:
    """Return the value at a path of mappings, or None."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
