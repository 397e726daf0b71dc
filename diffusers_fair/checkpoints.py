"""Checkpoints of a run: written whole or not at all, the newest found again, old ones removed."""

import shutil
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any], keep: int) -> None:
    """Write `step-NNNNNN/` below the folder, and keep only the newest ones.

    Args:
        folder: of all checkpoints of the run.
        iteration: number of updates made.
        state: tensors, numbers and containers of them.
        keep: how many stay.
    """
    name = f"step-{iteration:06d}"
    partial = folder / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(state | {"iteration": iteration}, partial / STATE)
    shutil.rmtree(folder / name, ignore_errors=True)
    partial.rename(folder / name)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint below the folder; None if there is none."""
    found = _checkpoints(folder)
    return torch.load(found[-1] / STATE, weights_only=True) if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; what was not finished has a name that starts with a dot."""
    return sorted(folder.glob("step-*"))
