"""Writes a Gradio Space that generates images from the same noise without and with adapters.

A Space is a folder with an app, its requirements, a page for the Hub, and copies of the adapters:
it runs with `python app.py`, and on the Hub.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import SpaceCardData

from diffusers_fair.adapters.folder import README_FILE, Adapter
from diffusers_fair.adapters.format import EMBEDS_FILE, INFO_FILE, WEIGHTS_FILE, AdapterInfo
from diffusers_fair.adapters.repository import REPOSITORY, open_fair_adapter
from diffusers_fair.backends.registry import base
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.families.base import Usual
from diffusers_fair.loading import MIRRORS
from diffusers_fair.paths import expand, require_writable
from diffusers_fair.publishing.card import fill
from diffusers_fair.publishing.licence import base_licence
from diffusers_fair.version import __version__

APP_FILE = "app.py"
SPACE_FILES = (APP_FILE, "requirements.txt", README_FILE)
SPACE_FOLDERS = ("adapter", "other")
"""Folders of the adapters in a Space."""
_TEMPLATES = "space_files"
_GRADIO = "6.31.0"  # version on the Hub; the app needs 6
_HARDWARE = "t4-small"  # a GPU, for base models other than the shipped ones


@dataclass(frozen=True, kw_only=True)
class _Column:
    """An adapter, and its column of images."""

    source: str
    """Folder or Hub id, as given."""
    name: str
    """What the page calls the adapter."""
    folder: str
    """Folder in the Space."""
    adapter: Adapter

    @property
    def is_scalable(self) -> bool:
        """Whether the scale can be other than 0 and 1."""
        return self.adapter.info.soft_tokens is None


def write_space(
    adapter: str | Path, out: str | Path, *, other: str | Path | None = None
) -> dict[str, Path]:
    """Write a Space completely or not at all.

    Args:
        adapter: adapter folder or Hub id.
        out: a new or empty folder, or one that already holds the same Space.
        other: another adapter for the same base model, for a third column of images.

    Returns:
        Name in the Space -> file.

    Raises:
        ValueError: an adapter is not found or is damaged; the adapters have different base models
            or are the same; or the folder holds something else.
    """
    out = require_writable(out)
    columns = _columns([adapter] if other is None else [adapter, other])
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".space-") as partial:
        new = Path(partial) / "space"
        _write(new, columns)
        if out.is_dir() and any(out.iterdir()):
            _check_same(new, out)
        else:
            if out.is_dir():
                out.rmdir()  # Windows does not replace even an empty folder
            os.replace(new, out)
    return _files(out)


def check_base_on_hub(adapter: str | Path) -> None:
    """Refuse an adapter whose base model the Hub does not have, before its Space is pushed.

    Raises:
        ValueError: the base model is a folder or file of this machine.
    """
    model = open_fair_adapter(adapter).info.base_model
    if model not in SHIPPED_BASES and not _is_on_hub(model):
        raise ValueError(
            f"a Space on the Hub cannot load the base model '{model}' from this machine: push the "
            "base model, and train with its Hub id, or leave out --push"
        )


# ---- columns -------------------------------------------------------------------------------------


def _columns(sources: Sequence[str | Path]) -> list[_Column]:
    """Open one adapter or two, and check that two can be compared."""
    adapters = [open_fair_adapter(source) for source in sources]
    if len(adapters) == 1:
        names = ["the adapter"]
    else:
        _check_comparable(*adapters)
        names = _short_names(list(map(str, sources)))
    return [
        _Column(source=str(source), name=name, folder=folder, adapter=adapter)
        for source, name, folder, adapter in zip(
            sources, names, SPACE_FOLDERS, adapters, strict=False
        )
    ]


def _check_comparable(one: Adapter, other: Adapter) -> None:
    models = [MIRRORS.get(x.info.base_model, x.info.base_model) for x in (one, other)]
    if models[0] != models[1] or one.info.fingerprint != other.info.fingerprint:
        raise ValueError(
            f"expected two adapters for the same base model, got '{one.folder}' for '{models[0]}' "
            f"and '{other.folder}' for '{models[1]}': write a Space for each"
        )
    if one.digest == other.digest:
        raise ValueError(
            f"expected two different adapters, but '{one.folder}' and '{other.folder}' have the "
            "same weights: leave out --other, or name another adapter"
        )


def _short_names(paths: Sequence[str]) -> list[str]:
    """Shorten different paths to as many of their last parts as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(x[-length:]) for x in parts]
        if len({*names}) == len(names):
            return names
    return list(paths)


# ---- files ---------------------------------------------------------------------------------------


def _write(folder: Path, columns: Sequence[_Column]) -> None:
    """Write the files of a Space to a new folder."""
    info = columns[0].adapter.info
    values = _values(info, columns)
    folder.mkdir()
    values["metadata"] = _metadata(info, columns, values["title"])
    for name in SPACE_FILES:
        (folder / name).write_text(fill(f"{_TEMPLATES}/{name}.jinja", info, **values), "utf-8")
    for column in columns:
        _write_adapter(folder / column.folder, column.adapter)


def _write_adapter(folder: Path, adapter: Adapter) -> None:
    """Copy what loading needs of an adapter, and write its table."""
    folder.mkdir()
    for name in (INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE):
        if (adapter.folder / name).is_file():
            shutil.copyfile(adapter.folder / name, folder / name)
    table = fill(f"{_TEMPLATES}/evaluation.md.jinja", adapter.info)
    (folder / "evaluation.md").write_text(table, "utf-8")


def _values(info: AdapterInfo, columns: Sequence[_Column]) -> dict[str, Any]:
    """Collect the values of the templates."""
    attributes = {a.name: None for column in columns for a in column.adapter.info.attributes}
    title = f"Fairness adapter{'s' * (len(columns) > 1)}: {', '.join(attributes)}"
    size = (info.recipe.get("evaluation") or {}).get("size")
    return {
        "columns": columns,
        "title": f"{title}, for {info.base_model.rpartition('/')[2]}",
        "base_model": _absolute(info.base_model),
        "usual": _usual(info),
        "size": size if isinstance(size, int) else None,
        "version": __version__,
    }


def _usual(info: AdapterInfo) -> Usual | None:
    """Return the sampling of the evaluation, or the usual one; None for that of the family."""
    if info.evaluation is None:
        return base(info.base_model).usual_sampling
    guidance_scale, steps = map(info.evaluation.get, ("guidance_scale", "steps"))
    if not isinstance(guidance_scale, int | float) or not isinstance(steps, int):
        raise ValueError(
            "the evaluation stored in the adapter is damaged: expected numbers as guidance_scale "
            f"and steps, got {guidance_scale!r} and {steps!r}; write the card again with --report"
        )
    return Usual(guidance_scale, steps)


def _absolute(model: str) -> str:
    """Make the path of a base model independent of the current folder."""
    if model in SHIPPED_BASES or _is_on_hub(model):
        return model
    return str(expand(model).absolute())


def _is_on_hub(model: str) -> bool:
    return REPOSITORY.fullmatch(model) is not None and not expand(model).exists()


def _metadata(info: AdapterInfo, columns: Sequence[_Column], title: str) -> SpaceCardData:
    """Build the metadata by which the Hub runs the Space."""
    licence = base_licence(info.base_model, info.base_revision)
    models = [info.base_model, *(column.source for column in columns)]
    more: dict[str, Any] = {"emoji": "⚖️", "colorFrom": "blue", "colorTo": "gray"}
    if info.base_model not in SHIPPED_BASES:
        more["suggested_hardware"] = _HARDWARE
    return SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=_GRADIO,
        app_file=APP_FILE,
        license=licence.license if licence else None,
        models=[model for model in models if _is_on_hub(model)] or None,
        tags=["diffusers-fair", "fairness", "bias-mitigation"],
        **more,
    )


def _files(folder: Path) -> dict[str, Path]:
    """Map the names in a folder to its files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _check_same(new: Path, old: Path) -> None:
    """Refuse to overwrite anything, such as an app that was edited."""
    before, after = _files(old), _files(new)
    different = sorted(before.keys() ^ after.keys())
    different += [
        name
        for name in sorted(before.keys() & after.keys())
        if before[name].read_bytes() != after[name].read_bytes()
    ]
    if different:
        raise ValueError(
            f"'{old}' already holds other files than this Space ('{different[0]}'): choose another "
            "folder, or empty it"
        )
