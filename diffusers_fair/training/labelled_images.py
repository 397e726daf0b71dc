"""Reads labelled images of faces, from a folder, from parquet files or from the Hub."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusers_fair import strict_json
from diffusers_fair.backends.sources import HUB_DATASET, HubDataset
from diffusers_fair.paths import expand
from diffusers_fair.vision.images import image_files, is_hidden

_Labelled = tuple[Sequence[Path | bytes], list[str], list[str]]
"""Image files or their contents, the class of each, and all classes."""


@dataclass(frozen=True)
class LabelledImages:
    """Face images with their classes."""

    files: Sequence[Path | bytes]
    """Paths of image files, or contents of image files."""
    labels: Tensor
    """(n,) indices into `classes`."""
    classes: tuple[str, ...]


def read_images(source: str | Path, label: str = "label") -> LabelledImages:
    """List labelled images.

    Args:
        source: a folder with a subfolder of images for each class; or a parquet file, or a folder
            of parquet files, with a column `image` (contents, or a struct with `bytes`) and a
            column of labels; or such a data set on the Hub, as `HubDataset.parse` reads it, which
            is downloaded to the Hub's cache.
        label: name of the label column. It holds words, or numbers with names in the file's
            metadata, as `datasets` writes them.

    Raises:
        ModuleNotFoundError: pyarrow, which parquet files need, is not installed.
        ValueError: no such file or column, or fewer than two images of a class; or the data set
            cannot be downloaded.
    """
    if str(source).startswith(HUB_DATASET):
        paths = HubDataset.parse(str(source)).paths()
        labelled = _read_parquet(paths, str(source), label)
    else:
        labelled = _read_path(expand(source), label)
    files, words, classes = labelled
    counts = Counter(words)
    if len(counts) < 2 or min(counts.values()) < 2:
        raise ValueError(
            f"'{source}' must hold two or more classes with two or more images each, "
            f"got {dict(counts)}"
        )
    classes = [name for name in classes if counts[name]]
    return LabelledImages(
        files, torch.tensor([classes.index(word) for word in words]), tuple(classes)
    )


def _read_path(source: Path, label: str) -> _Labelled:
    if not source.exists():
        raise ValueError(
            f"there is nothing at '{source}': expected a folder, a parquet file or a data set on "
            f"the Hub as {HUB_DATASET}ORG/NAME"
        )
    paths = [source]
    if source.suffix != ".parquet":
        paths = sorted(p for p in source.glob("*.parquet") if not is_hidden(Path(p.name)))
    return _read_parquet(paths, str(source), label) if paths else _read_folder(source)


def _read_folder(source: Path) -> _Labelled:
    files = image_files(source, "*/*")
    words = [file.parent.name for file in files]
    return files, words, sorted(set(words))


def _read_parquet(paths: Sequence[Path], source: str, label: str) -> _Labelled:
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowInvalid
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "parquet files need the package 'pyarrow': pip install pyarrow", name=error.name
        ) from error
    try:
        names = pq.read_schema(paths[0]).names
        for column in ("image", label):
            if column not in names:
                raise ValueError(f"'{source}' has no column '{column}', it has {', '.join(names)}")
        table = pq.read_table(list(map(str, paths)), columns=["image", label])
    except ArrowInvalid as error:
        raise ValueError(f"'{source}' cannot be read as parquet: {error}") from error
    files = [x["bytes"] if isinstance(x, dict) else x for x in table["image"].to_pylist()]
    values = table[label].to_pylist()
    known = _named_labels(table.schema.metadata or {}, label)
    for row, (file, value) in enumerate(zip(files, values, strict=True)):
        # `datasets` marks images without a label by -1
        is_labelled = value in range(len(known)) if known else value is not None
        if not (isinstance(file, bytes) and is_labelled):
            raise ValueError(
                f"row {row} of '{source}' must have the contents of an image and a label, got the "
                f"label {value} and {type(file).__name__} as the image: leave such rows out"
            )
    if known:
        return files, [known[value] for value in values], known
    words = list(map(str, values))
    return files, words, sorted(set(words))


def _named_labels(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """Return the names of numbered labels, as the library `datasets` stores them."""
    info = strict_json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    return info.get("features", {}).get(label, {}).get("names", [])
