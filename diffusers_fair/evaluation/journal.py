"""The judged batches of an evaluation on disk, from which it can be resumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair import atomic, strict_json
from diffusers_fair.reports.records import Records

_STATE = "state.json"


@dataclass(frozen=True, eq=False)
class BatchRecords:
    """The records and sample images of a batch."""

    records: Records
    samples: Mapping[tuple[int, int], np.ndarray]
    """(prompt, image) -> (h, w, 3) uint8, for the few images that are shown as samples."""


class Journal:
    """A mapping of batch indices to `BatchRecords` on disk, one file per batch.

    Args:
        folder: folder of a journal that `begin` created.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.provenance: dict[str, Any] = _state(folder)["provenance"]
        """Provenance of the first run."""

    @classmethod
    def begin(
        cls, folder: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "Journal":
        """Create a journal, or resume the one in the folder; one without batches is replaced.

        Args:
            folder: created if needed.
            identity: settings that must be the same to resume; JSON values.
            provenance: provenance of this run; only that of the first run is kept.

        Raises:
            ValueError: the folder holds the journal of another evaluation.
        """
        folder.mkdir(parents=True, exist_ok=True)
        identity = strict_json.loads(strict_json.dumps(identity))
        if not any(folder.glob("batch-*.npz")):
            text = strict_json.dumps({"asked": identity, "provenance": provenance}, indent=1)
            atomic.write(folder / _STATE, text.encode())
        stored = _state(folder)["asked"]
        stored.pop("device", None)  # earlier versions refused another device
        different = [k for k in {**stored, **identity} if stored.get(k) != identity.get(k)]
        if different:
            raise ValueError(
                f"'{folder.parent}' holds an evaluation that was stopped, with other "
                f"{', '.join(different)}: start it with the same to resume it, choose another "
                f"folder, or remove '{folder}'"
            )
        return cls(folder)

    def __contains__(self, batch: int) -> bool:
        return self._file(batch).exists()

    def __setitem__(self, batch: int, content: BatchRecords) -> None:
        arrays = {f"records/{name}": values for name, values in content.records.arrays().items()}
        arrays |= {f"samples/{i}/{j}": image for (i, j), image in content.samples.items()}
        buffer = BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        atomic.write(self._file(batch), buffer.getvalue())

    def __getitem__(self, batch: int) -> BatchRecords:
        records, samples = {}, {}
        with np.load(self._file(batch), allow_pickle=False) as stored:
            for name, values in stored.items():
                kind, _, key = name.partition("/")
                if kind == "records":
                    records[key] = values
                else:
                    i, j = key.split("/")
                    samples[int(i), int(j)] = values
        return BatchRecords(Records.from_arrays(records), samples)

    def _file(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.npz"


def stored_batch_size(folder: Path) -> int | None:
    """Return the batch size of the journal in the folder; None if there is no journal."""
    return _state(folder)["asked"]["batch_size"] if (folder / _STATE).exists() else None


def _state(folder: Path) -> dict[str, Any]:
    return strict_json.loads((folder / _STATE).read_text("utf-8"))
