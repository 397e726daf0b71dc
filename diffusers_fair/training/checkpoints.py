"""Checkpoints of a run: written whole or not at all, the newest sound one found again."""

import hashlib
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from diffusers_fair import atomic

STATE = "state.pt"
DIGEST = "state.sha256"


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any], keep: int) -> None:
    """Write `step-NNNNNN/` below the folder, and keep only the newest ones.

    Args:
        folder: of all checkpoints of the run.
        iteration: number of updates made.
        state: tensors, numbers and containers of them.
        keep: how many stay.

    Raises:
        OSError: it cannot be written; the older ones are untouched, and nothing is left of it.
    """
    buffer = io.BytesIO()
    torch.save(state | {"iteration": iteration}, buffer)
    data = buffer.getvalue()
    final = folder / _name(iteration)
    unfinished = atomic.partial(final)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / STATE).write_bytes(data)
        (unfinished / DIGEST).write_text(hashlib.sha256(data).hexdigest())
        shutil.rmtree(final, ignore_errors=True)  # one that was passed over
        atomic.settle(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest sound checkpoint below the folder, onto the CPU; None if there is none.

    One that is damaged is passed over with a warning.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path)
        except Exception as error:  # whatever a damaged file may cause
            warnings.warn(
                f"checkpoint '{path}' is damaged ({type(error).__name__}: {error}): going on from "
                "an older one",
                stacklevel=2,
            )
    return None


def discard_after(folder: Path, iteration: int) -> None:
    """Remove what stands in the way of going on from an iteration: newer, unfinished, damaged."""
    for path in _checkpoints(folder):
        if path.name > _name(iteration):
            shutil.rmtree(path)
    atomic.sweep(folder)


def _read(path: Path) -> dict[str, Any]:
    data = (path / STATE).read_bytes()
    digest = path / DIGEST
    if digest.exists() and digest.read_text() != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{STATE} has another checksum than when it was written")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _name(iteration: int) -> str:
    return f"step-{iteration:06d}"


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"))
