"""Reads, checks and writes adapter folders. They may come from anybody, so everything is checked.

- `pytorch_lora_weights.safetensors`: LoRA weights; plain `pipe.load_lora_weights(folder)` works
- `learned_embeds.safetensors`: soft tokens; plain `pipe.load_textual_inversion(folder, weight_name=
  "learned_embeds.safetensors")` works, with the placeholder typed before the prompt; for families
  with several text encoders it has a tensor for each, such as `clip_l` and `clip_g`
- `fair_adapter.json`: description of the adapter, `AdapterInfo`; its schema is
  `fair_adapter.schema.json`
- `README.md`, `samples/*.png`, report files: for people; not read here
- `exports/PROGRAM/*.safetensors`: the adapter for other programs; not read here
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from diffusers_fair import atomic
from diffusers_fair.adapters.format import (
    EMBEDS_FILE,
    INFO_FILE,
    MAX_BYTES,
    WEIGHTS_FILE,
    AdapterInfo,
    dump_info,
    load_info,
)
from diffusers_fair.adapters.tensors import (
    Weights,
    header_for_digest,
    read_lora,
    read_soft_tokens,
    write_tensors,
)
from diffusers_fair.paths import expand

README_FILE = "README.md"
SAMPLES_FOLDER = "samples"
EXPORTS_FOLDER = "exports"
REPORT_FILES = ("report.json", "report.html", "records.jsonl")
_DIGEST_LENGTH = 16  # hexadecimal digits


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter folder that was opened and checked."""

    folder: Path
    info: AdapterInfo
    weights: Weights
    """All weights, in diffusers' layout."""
    checksums: Mapping[str, str]
    """SHA-256 of each weights file."""
    digest: str
    """Digest of all weights, by which reports distinguish adapters of the same name."""


def open_adapter(folder: "str | Path | Adapter") -> Adapter:
    """Open an adapter folder that may come from anybody.

    Args:
        folder: an adapter folder; an open adapter is returned as it is.

    Raises:
        ValueError: something is missing, damaged, of another version or invalid.
    """
    if isinstance(folder, Adapter):
        return folder
    folder = expand(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no adapter folder at '{folder}'")
    path = _checked_file(folder / INFO_FILE)
    info = load_info(path.read_bytes(), str(path))
    paths = _weight_files(folder, info)
    weights: Weights = {}
    if WEIGHTS_FILE in paths:
        weights |= read_lora(paths[WEIGHTS_FILE], info)
    if EMBEDS_FILE in paths:
        weights |= read_soft_tokens(paths[EMBEDS_FILE], info)
    checksums, digest = _hash(paths)
    for name, checksum in (info.checksums or {}).items():
        if checksum != checksums.get(name):
            raise ValueError(
                f"'{folder / name}' is damaged: its checksum is not the one in {INFO_FILE}"
            )
    return Adapter(folder, info, weights, checksums, digest)


def read_adapter(folder: str | Path) -> tuple[AdapterInfo, Weights]:
    """Read the description of an adapter, and all its weights in diffusers' layout.

    Raises:
        ValueError: as in `open_adapter`.
    """
    adapter = open_adapter(folder)
    return adapter.info, adapter.weights


def write_adapter(folder: str | Path, weights: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter folder completely or not at all.

    Args:
        folder: a new or empty folder, or an adapter folder, which is replaced.
        weights: weights in diffusers' layout, as `TrainableAdapter.weights` returns them.
        info: description of the adapter.

    Raises:
        ValueError: the folder holds something else, or `open_adapter` would refuse the result.
    """
    folder = expand(folder).resolve()
    _refuse_foreign(folder)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_tensors(temporary, weights, info)
        names = (WEIGHTS_FILE, EMBEDS_FILE)
        files = {name: temporary / name for name in names if (temporary / name).exists()}
        info = replace(info, checksums=_hash(files)[0])
        (temporary / INFO_FILE).write_bytes(dump_info(info))
        open_adapter(temporary)  # refuse to publish a folder that cannot be read back
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_info(folder: str | Path | Adapter, info: AdapterInfo) -> None:
    """Rewrite `fair_adapter.json` without touching the weights.

    Args:
        folder: an adapter folder.
        info: description of the same components.

    Raises:
        ValueError: not an adapter folder, or `open_adapter` would refuse the result.
    """
    adapter = open_adapter(folder)
    if info.components != adapter.info.components:
        raise ValueError(
            f"'{adapter.folder}' holds the weights of {adapter.info.components}, not of "
            f"{info.components}: write them with write_adapter"
        )
    path = adapter.folder / INFO_FILE
    content = dump_info(replace(info, checksums=adapter.checksums))
    load_info(content, str(path))
    atomic.write(path, content)


# ---- folders and files ---------------------------------------------------------------------------


def _refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite anything but an empty folder or an adapter folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: choose a folder for the adapter")
    names = {path.name for path in folder.iterdir()}
    known = {INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE, README_FILE, *REPORT_FILES}
    known |= {SAMPLES_FOLDER, EXPORTS_FOLDER}
    foreign = sorted(names - known)
    if foreign or (names and INFO_FILE not in names):
        raise ValueError(
            f"'{folder}' holds something other than an adapter "
            f"('{(foreign or sorted(names))[0]}'): choose another folder or empty it"
        )


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the finished folder to its final name, then remove its predecessor."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name(temporary.name + "-old")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old)


def _checked_file(path: Path) -> Path:
    """Check that a file is regular, lies in the folder itself and is not too large; return it."""
    if not path.is_file():
        raise ValueError(f"'{path.parent}' is not an adapter folder: '{path.name}' is missing")
    if not any(path.resolve().is_relative_to(home) for home in _homes(path.parent.resolve())):
        raise ValueError(f"'{path}' is a link out of the folder: put the file itself there")
    check_size(str(path), path.name, path.stat().st_size)
    return path


def check_size(where: str, name: str, size: int) -> None:
    """Refuse a file of the folder that is larger than allowed.

    Raises:
        ValueError: it has more bytes than `MAX_BYTES` allows.
    """
    if size > MAX_BYTES[name]:
        raise ValueError(f"'{where}' has {size} bytes, more than the {MAX_BYTES[name]} allowed")


def _weight_files(folder: Path, info: AdapterInfo) -> dict[str, Path]:
    """Return the weights files of an adapter; refuse one that `info` does not describe."""
    is_described = {WEIGHTS_FILE: bool(info.lora), EMBEDS_FILE: info.soft_tokens is not None}
    for name, described in is_described.items():
        if not described and (folder / name).exists():
            raise ValueError(f"'{folder}' has a '{name}', which its {INFO_FILE} does not describe")
    return {name: _checked_file(folder / name) for name in is_described if is_described[name]}


def _hash(paths: Mapping[str, Path]) -> tuple[dict[str, str], str]:
    """SHA-256 of each file, and the digest of all in the order of their names."""
    checksums, together = dict.fromkeys(paths, ""), hashlib.sha256()
    for name, path in sorted(paths.items()):
        with path.open("rb") as file:
            together.update(header_for_digest(file))
            start = file.tell()
            file.seek(0)
            alone = hashlib.sha256(file.read(start))
            while part := file.read(2**20):
                alone.update(part)
                together.update(part)
        checksums[name] = alone.hexdigest()
    return checksums, together.hexdigest()[:_DIGEST_LENGTH]


def _homes(folder: Path) -> Iterator[Path]:
    """Folders that may hold the files: a snapshot in the Hub's cache consists of links to blobs."""
    yield folder
    if folder.parent.name == "snapshots":
        yield folder.parent.parent / "blobs"
