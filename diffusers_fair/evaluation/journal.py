"""What an evaluation has seen so far, on disk, so that it may be stopped and started again."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair.reports.records import Records

STATE = "state.json"


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of a batch of images."""

    records: Records
    samples: Mapping[tuple[int, int], np.ndarray]
    """(prompt, image) -> (h, w, 3) uint8, of the few images that are kept to look at."""


class Journal:
    """Batch number -> what was seen in it, a file each; a file is whole or not there.

    Args:
        folder: that `begin` was called for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.provenance: dict[str, Any] = _state(folder)["provenance"]
        """Of the first start."""

    @classmethod
    def begin(
        cls, folder: Path, asked: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "Journal":
        """Start one, or go on with the one that is there.

        Args:
            folder: made if need be.
            asked: what must be the same to go on, as JSON has it.
            provenance: kept at the first start.

        Raises:
            ValueError: the folder holds the batches of something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(asked))
        if not (folder / STATE).exists():
            text = json.dumps({"asked": asked, "provenance": provenance}, indent=1)
            _replace(folder / STATE, text.encode())
        there = _state(folder)["asked"]
        different = [k for k in {**there, **asked} if there.get(k) != asked.get(k)]
        if different:
            raise ValueError(
                f"'{folder.parent}' holds an evaluation that was stopped, with other "
                f"{', '.join(different)}: start it with the same to go on, choose another folder, "
                f"or remove '{folder}'"
            )
        return cls(folder)

    def __contains__(self, batch: int) -> bool:
        return self._file(batch).exists()

    def __setitem__(self, batch: int, seen: Seen) -> None:
        arrays = {f"records/{name}": values for name, values in seen.records.arrays().items()}
        arrays |= {f"samples/{i}/{j}": image for (i, j), image in seen.samples.items()}
        buffer = BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        _replace(self._file(batch), buffer.getvalue())

    def __getitem__(self, batch: int) -> Seen:
        records, samples = {}, {}
        with np.load(self._file(batch), allow_pickle=False) as stored:
            for name, values in stored.items():
                kind, _, key = name.partition("/")
                if kind == "records":
                    records[key] = values
                else:
                    i, j = key.split("/")
                    samples[int(i), int(j)] = values
        return Seen(Records.from_arrays(records), samples)

    def _file(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.npz"


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text("utf-8"))


def _replace(file: Path, content: bytes) -> None:
    """Write a file at one stroke."""
    partial = file.with_suffix(".writing")
    partial.write_bytes(content)
    os.replace(partial, file)
