"""Exports adapters to files for other programs, such as ComfyUI."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffusers_fair import atomic
from diffusers_fair.adapters.export import exported_lora, exported_soft_tokens
from diffusers_fair.adapters.folder import Adapter
from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.adapters.repository import open_fair_adapter
from diffusers_fair.adapters.tensors import data_start, serialize
from diffusers_fair.families.other_programs import PROGRAMS, Program, base_names
from diffusers_fair.paths import expand
from diffusers_fair.publishing.licence import base_licence

_ENDING = ".safetensors"
_LORA, _SOFT_TOKENS = "lora", "textual-inversion"  # kinds of files, as modelspec names them


@dataclass(frozen=True)
class ExportedFile:
    """A file for another program."""

    name: str
    content: bytes
    usage: str
    """How the program is told to use it."""


@dataclass(frozen=True)
class Usage:
    """How a program is told to use an adapter."""

    program: str
    """Name in commands."""
    title: str
    usage: str


def export_adapter(
    adapter: str | Path | Adapter,
    program: str,
    out: str | Path = ".",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[Path, str]:
    """Write the LoRA layers and the soft tokens of an adapter as files for another program.

    Soft tokens are used by the name of their file.

    Args:
        adapter: adapter folder, Hub id, or an open adapter.
        program: `comfyui`, `a1111`, `kohya` or `invokeai`.
        out: a folder, or a new file that ends with `.safetensors`. In a folder, the files are named
            for the attributes and the base model.
        revision: branch, tag or commit of the adapter on the Hub.
        token: access token for a private repository.

    Returns:
        Each file and how the program is told to use it.

    Raises:
        ValueError: no such adapter or program, the program does not read this kind of adapter, or
            a file exists; in that case nothing is written.
    """
    out = expand(out)
    single = out.stem if out.suffix == _ENDING and not out.is_dir() else None
    files = exported_files(open_fair_adapter(adapter, revision, token), program, name=single)
    folder = out if single is None else out.parent
    paths = {folder / file.name: file for file in files}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: choose a folder, or a new {_ENDING} file")
    for path in paths:
        if path.exists():
            raise ValueError(f"'{path}' exists already: remove it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_all({path: file.content for path, file in paths.items()})
    return {path: file.usage for path, file in paths.items()}


def exported_files(
    adapter: Adapter, program: str, name: str | None = None
) -> tuple[ExportedFile, ...]:
    """Return the files of an adapter for another program.

    Args:
        adapter: an open adapter.
        program: name of the program in `PROGRAMS`.
        name: name of the only file, without the ending.

    Raises:
        ValueError: an unknown program, one that does not read this kind of adapter, or a name for
            several files.
    """
    info = adapter.info
    _check(info, program)
    names = {kind: name or default for kind, default in _names(info).items()}
    if name is not None and len(names) > 1:
        raise ValueError(
            f"an adapter of LoRA layers and soft tokens is exported to two files: choose a folder, "
            f"got '{name}{_ENDING}'"
        )
    tensors = {
        _LORA: exported_lora(info, adapter.weights),
        _SOFT_TOKENS: exported_soft_tokens(info, adapter.weights),
    }
    return tuple(
        ExportedFile(
            file + _ENDING,
            _content(adapter, kind, file, tensors[kind]),
            _usage(PROGRAMS[program], kind, file),
        )
        for kind, file in names.items()
    )


def usages(info: AdapterInfo) -> Iterator[Usage]:
    """Yield how each program that reads an adapter is told to use it."""
    for name, program in PROGRAMS.items():
        if not _unread(info, program):
            files = _names(info).items()
            text = "; ".join(_usage(program, kind, file) for kind, file in files)
            yield Usage(name, program.title, text)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write all of some new files, or none.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        for path, content in contents.items():
            atomic.write(path, content)
    except BaseException:
        for path in contents:
            path.unlink(missing_ok=True)
        raise


def _check(info: AdapterInfo, program: str) -> None:
    """Refuse a program that does not exist, or does not read all of an adapter."""
    if program not in PROGRAMS:
        raise ValueError(f"expected one of the programs {', '.join(PROGRAMS)}, got '{program}'")
    if unread := _unread(info, PROGRAMS[program]):
        others = [name for name, other in PROGRAMS.items() if not _unread(info, other)]
        advice = f"export it to {' or '.join(others)}" if others else "no other program does"
        raise ValueError(
            f"{PROGRAMS[program].title} does not read {unread} for {info.family}: {advice}"
        )


def _unread(info: AdapterInfo, program: Program) -> str:
    """Name the part of an adapter that a program does not read; empty if it reads all of it."""
    if info.lora and info.family not in program.lora:
        return "LoRA layers"
    if info.soft_tokens and info.family not in program.soft_tokens:
        return "soft tokens"
    return ""


def _names(info: AdapterInfo) -> dict[str, str]:
    """Map the kinds of files of an adapter to their names; that of soft tokens is typed."""
    attributes = "-".join(attribute.name for attribute in info.attributes)
    base = info.base_model.rpartition("/")[2]
    names = {}
    if info.lora:
        names[_LORA] = _slug(f"fair-{attributes}-{base}")
    if info.soft_tokens:
        names[_SOFT_TOKENS] = _slug(f"fair-{attributes}-prefix")
    return names


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:100]


def _usage(program: Program, kind: str, name: str) -> str:
    usage = program.use_lora if kind == _LORA else program.use_soft_tokens
    return usage.format(name=name)


def _content(adapter: Adapter, kind: str, name: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file, with the metadata that these programs show."""
    bare = serialize(tensors, {"format": "pt"})
    tensor_hash = hashlib.sha256(bare[data_start(bare) :]).hexdigest()
    base = base_names(adapter.info.family, adapter.info.base_model, adapter.weights)
    metadata = {
        "format": "pt",
        "modelspec.architecture": f"{base.architecture}/{kind}",
        "modelspec.hash_sha256": f"0x{tensor_hash}",
        "sshs_model_hash": tensor_hash,
        "ss_base_model_version": base.version,
        "ss_v2": str(base.version == "sd_v2"),
        "ss_output_name": name,
        **_description(adapter.info, kind, name),
    }
    return serialize(tensors, metadata)


def _description(info: AdapterInfo, kind: str, name: str) -> dict[str, str]:
    """Return the metadata that comes from `fair_adapter.json`."""
    attributes = ", ".join(attribute.name for attribute in info.attributes)
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"Fairness adapter: {attributes}, for {info.base_model}",
        "modelspec.description": f"Rebalances the perceived {attributes} of generated people.",
        "modelspec.tags": f"fairness, bias-mitigation, {attributes}",
        "ss_sd_model_name": info.base_model,
    }
    if licence := base_licence(info.base_model, info.base_revision):
        metadata["modelspec.license"] = licence.title
    if kind == _SOFT_TOKENS:
        metadata["modelspec.trigger_phrase"] = name
        metadata["modelspec.usage_hint"] = f"Put {name} once before each prompt."
        return metadata
    sizes = info.lora.values()
    return metadata | {
        "modelspec.usage_hint": "Use it at strength 1; there is no trigger word.",
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common({str(size.rank) for size in sizes}),
        "ss_network_alpha": _common({f"{size.alpha:g}" for size in sizes}),
    }


def _common(values: set[str]) -> str:
    """Return the only value, or the word that kohya's programs write for several."""
    return values.pop() if len(values) == 1 else "Dynamic"
