"""The requirements of a model, and whether they are available. Downloads nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from diffusers_fair.backends.sources import (
    INDEX,
    ClassifierTraining,
    HubModel,
    HubPipeline,
    Source,
    UrlFile,
    components_with_weights,
)
from diffusers_fair.paths import expand

_SUFFIXES = (".safetensors", ".bin")  # of weights; if a folder has both, one is read


@dataclass(frozen=True)
class Need:
    """A requirement of a model."""

    what: str
    available: bool
    advice: str = ""
    """What to do if it is missing."""
    size: int = 0
    """Size of the weights in bytes."""
    source: Source | ClassifierTraining | None = None
    """Where `setup` can get it from."""


def package(name: str, install: str = "pip install 'diffusers-fair[train]'") -> Need:
    """Check for a Python package, by the name under which it is imported."""
    return Need(f"package {name}", is_installed(name), install)


def is_installed(name: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, as trackers make, is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def pretrained(
    model: str, revision: str | None = None, parts: Sequence[str] = ("",), prefix: str = ""
) -> Need:
    """Check for weights in a folder or in the Hub's cache.

    Args:
        model: folder or Hub id.
        revision: commit, tag or branch on the Hub.
        parts: subfolders that hold weights.
        prefix: beginning of the names of the files of weights.
    """
    source = HubModel(model, revision, tuple(parts), prefix) if _can_be_on_hub(model) else None
    folder = _find(model, revision)
    if folder is None:
        return Need(model, False, _advice(model), source=source)
    return _weights_need(model, folder, parts, source)


def pipeline(model: str, revision: str | None = None) -> Need:
    """Check for the weights of a pipeline's components in a folder or in the Hub's cache.

    Args:
        model: folder or Hub id.
        revision: commit, tag or branch on the Hub.
    """
    source = HubPipeline(model, revision) if _can_be_on_hub(model) else None
    folder = _find(model, revision)
    if folder is None:
        return Need(model, False, _advice(model), source=source)
    try:
        parts = components_with_weights(folder / INDEX)
    except FileNotFoundError:
        return Need(model, False, f"'{folder}' is no pipeline: it has no {INDEX}", source=source)
    except (OSError, ValueError) as error:
        return Need(model, False, str(error), source=source)
    return _weights_need(model, folder, parts, source)


def _weights_need(model: str, folder: Path, parts: Sequence[str], source: Source | None) -> Need:
    """Check for weights in subfolders."""
    sizes = [_weights(folder / part) for part in parts]
    missing = [part or "weights" for part, size in zip(parts, sizes, strict=True) if not size]
    return Need(model, not missing, f"'{folder}' has no {', '.join(missing)}", sum(sizes), source)


def file(path: Path, advice: str, source: UrlFile | None = None) -> Need:
    """Check for a file of weights, which may have a source."""
    available = path.is_file()
    return Need(path.name, available, advice, path.stat().st_size if available else 0, source)


def _advice(model: str) -> str:
    """Advise on a model that is neither a folder nor in the cache."""
    if model.count("/") > 1:  # no repository has such a name
        return "there is no such folder: train it or put it there, or name another folder or Hub id"
    return f"neither a folder nor in the Hub's cache: hf download {model}"


def _can_be_on_hub(model: str) -> bool:
    return not expand(model).is_dir() and model.count("/") <= 1


def _find(model: str, revision: str | None) -> Path | None:
    """Find a folder, or that of a Hub repository in the cache."""
    local = expand(model)
    return local if local.is_dir() else cached(model, revision)


def cached(model: str, revision: str | None) -> Path | None:
    """Find the folder of a Hub repository in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _weights(folder: Path) -> int:
    """Return the size of the weights in a folder, in bytes."""
    return max(sum(f.stat().st_size for f in folder.glob(f"*{suffix}")) for suffix in _SUFFIXES)
