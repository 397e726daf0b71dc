"""Checkpoints: written atomically, and read from the newest intact one."""

import hashlib
import io
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from diffusers_fair import atomic

logger = logging.getLogger(__name__)

_STATE = "state.pt"
_DIGEST = "state.sha256"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write `step-NNNNNN/` into the folder, and keep only the newest checkpoints.

    Args:
        folder: folder of the run's checkpoints.
        step: number of updates so far.
        state: tensors, numbers and containers of them.
        keep: number of checkpoints to keep.

    Raises:
        OSError: it cannot be written; older checkpoints stay, and this one leaves no files.
    """
    buffer = io.BytesIO()
    torch.save(state | {"iteration": step}, buffer)
    data = buffer.getvalue()
    final = folder / _name(step)
    unfinished = atomic.partial_path(final)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / _STATE).write_bytes(data)
        (unfinished / _DIGEST).write_text(hashlib.sha256(data).hexdigest(), "ascii")
        shutil.rmtree(final, ignore_errors=True)  # if it is damaged
        atomic.finish(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest intact checkpoint in the folder onto the CPU; None if there is none.

    Damaged checkpoints are skipped with a warning.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            return _read(path)
        except Exception as error:  # whatever a damaged file may cause
            logger.warning(
                f"checkpoint '{path}' is damaged ({type(error).__name__}: {error}): resuming from "
                "an older one"
            )
    return None


def discard_checkpoints_after(folder: Path, step: int) -> None:
    """Remove unfinished checkpoints, and those that are newer than an iteration."""
    for path in _checkpoints(folder):
        if path.name > _name(step):
            shutil.rmtree(path)
    atomic.remove_partial(folder)


def _read(path: Path) -> dict[str, Any]:
    data = (path / _STATE).read_bytes()
    digest = path / _DIGEST
    if digest.exists() and digest.read_text("ascii") != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{_STATE} has another checksum than when it was written")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))
