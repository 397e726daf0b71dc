"""The loop over the batches of an evaluation, resumable and shared by all processes."""

import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_fair import distributed
from diffusers_fair.evaluation.batch_size import default_batch_size
from diffusers_fair.evaluation.checks import positive
from diffusers_fair.evaluation.generate import pairs_of, progress_bar
from diffusers_fair.evaluation.journal import BatchRecords, Journal, stored_batch_size
from diffusers_fair.folder_lock import folder_lock
from diffusers_fair.reports.folder import save_report
from diffusers_fair.reports.records import Records
from diffusers_fair.reports.report import Report
from diffusers_fair.vision.judges import Judges

PARTIAL = ".partial"  # in the report's folder while the evaluation runs


@dataclass(frozen=True)
class Execution:
    """How the parts of an evaluation process their images."""

    label: str
    """Name of the evaluated model in tables and progress bars."""
    judges: Judges
    batch_size: int | None
    """Images that are processed together; None for `default_batch_size`."""
    out: Path | None
    """Folder of the report; None to keep everything in memory."""
    progress: bool
    device: torch.device
    """Device that generates the images, or judges those that are read."""

    def __post_init__(self) -> None:
        """Refuse batches without images."""
        if self.batch_size is not None:
            positive(self.batch_size, "batch_size")

    @property
    def journal_folder(self) -> Path | None:
        """Folder of the journals, from which the evaluation can be resumed."""
        return None if self.out is None else self.out / PARTIAL

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other launches out of the report's folder, if there is one.

        Raises:
            ValueError: another process is writing to it.
        """
        with nullcontext() if self.out is None else folder_lock(self.out):
            yield

    def title(self, part: str) -> str | None:
        """Return the title of the progress bar of a part; None to show none."""
        return f"{self.label}, {part}" if self.progress else None


def judge_all(
    folder: Path | None,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    counts: Sequence[int],
    judge: Callable[[np.ndarray], BatchRecords],
    execution: Execution,
    part: str,
) -> tuple[Records, dict[int, np.ndarray], Mapping[str, Any]]:
    """Judge every batch that is not in the journal yet.

    Args:
        folder: folder of the journal; None keeps the records in memory.
        identity: settings that must be the same for an evaluation to be resumed.
        provenance: provenance of this run.
        counts: number of images of each prompt.
        judge: generates or reads the images of a batch, given their prompt and image indices
            (n, 2), and judges them.
        execution: how images are processed.
        part: name of this part of the evaluation in the progress bar.

    Returns:
        The records of all images, sample images by prompt, and the provenance of the first run.
    """
    size = execution.batch_size
    if size is None:
        size = _batch_size(folder, execution.device, lambda: judge(pairs_of(counts, 1)[0]))
    batches = pairs_of(counts, size)
    done: MutableMapping[int, BatchRecords] | Journal = {}
    if folder is not None:
        done = _journal(folder, {**identity, "batch_size": size}, provenance)
        provenance = done.provenance
    is_shared = folder is not None  # without a journal, every process judges all batches
    first, step = (distributed.rank(), distributed.world_size()) if is_shared else (0, 1)
    shard = range(first, len(batches), step)
    total = sum(len(batches[i]) for i in shard)
    with progress_bar(total, execution.title(part) if first == 0 else None) as advance:
        for i in shard:
            if i not in done:
                done[i] = judge(batches[i])
            advance(len(batches[i]))
    if is_shared:
        distributed.barrier()
    return *_joined([done[i] for i in range(len(batches))]), provenance


def save_once(report: Report, out: Path) -> None:
    """Save the report from the main process once every process has read the journals."""
    distributed.barrier()
    if distributed.is_main():
        save_report(report, out)
        shutil.rmtree(out / PARTIAL)
    distributed.barrier()


def _batch_size(
    folder: Path | None, device: torch.device, judge_one: Callable[[], BatchRecords]
) -> int:
    """Choose a batch size that all processes with a journal share, and that resuming repeats."""
    if folder is None:
        return default_batch_size(device, judge_one)
    size = stored_batch_size(folder) or default_batch_size(device, judge_one)
    return -distributed.max_across(-size)


def _journal(folder: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> Journal:
    """Open the journal that all processes share; the main process creates it."""
    if distributed.is_main():
        Journal.begin(folder, identity, provenance)
    distributed.barrier()
    return Journal(folder)


def _joined(batches: Sequence[BatchRecords]) -> tuple[Records, dict[int, np.ndarray]]:
    """Join the records of all batches, and their sample images by prompt."""
    samples: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        for (i, _), image in batch.samples.items():
            samples.setdefault(i, []).append(image)
    records = Records.concatenate([batch.records for batch in batches])
    return records, {i: np.stack(images) for i, images in samples.items()}
