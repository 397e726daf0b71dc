"""What a model needs before it can be loaded, and whether it is there. Downloads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".safetensors", ".bin")  # of weights; where both are there, one of them is read


@dataclass(frozen=True)
class Need:
    """One thing that must be there."""

    what: str
    there: bool
    advice: str = ""
    """What to do if it is not."""
    size: int = 0
    """Of the weights as stored, in bytes."""


def package(name: str, install: str = "pip install 'diffusers-fair[train]'") -> Need:
    """A Python package, by the name it is imported by."""
    return Need(f"package {name}", find_spec(name) is not None, install)


def pretrained(model: str, revision: str | None = None, parts: Sequence[str] = ("",)) -> Need:
    """Weights in a folder, or in the Hub's cache.

    Args:
        model: folder or Hub id.
        revision: commit, tag or branch on the Hub.
        parts: folders in it that hold weights.
    """
    folder = Path(model) if Path(model).is_dir() else _cached(model, revision)
    if folder is None:
        return Need(model, False, _advice(model))
    sizes = [_weights(folder / part) for part in parts]
    missing = [part or "weights" for part, size in zip(parts, sizes, strict=True) if not size]
    return Need(model, not missing, f"'{folder}' has no {', '.join(missing)}", sum(sizes))


def file(path: Path, advice: str) -> Need:
    """A file of weights."""
    there = path.is_file()
    return Need(path.name, there, advice, path.stat().st_size if there else 0)


def _advice(model: str) -> str:
    """What to do where a model is neither a folder nor in the cache."""
    if model.count("/") > 1:  # no repository has such a name
        return "not a folder: train or put it there first, or name another folder or a Hub id"
    return f"not a folder, and not in the Hub's cache: hf download {model}"


def _cached(model: str, revision: str | None) -> Path | None:
    """The folder of a Hub repository in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _weights(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return max(sum(f.stat().st_size for f in folder.glob(f"*{suffix}")) for suffix in SUFFIXES)
