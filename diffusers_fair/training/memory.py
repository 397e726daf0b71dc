"""The memory that images take, measured, and how many of them fit."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

GB = 1e9  # bytes


class BudgetError(ValueError):
    """Not even one image fits."""


def peak(device: torch.device) -> int:
    """The most bytes so far: of the GPU's memory by torch, on the CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak(device: torch.device) -> None:
    """Let `peak` begin anew; on the CPU Linux alone can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def fitting(measure: Callable[[int], int], most: int, budget: float) -> int:
    """Find how many images at a time fit a budget, doubling from one.

    A number is tried only if what the last doubling added, twice, is still within the budget.

    Args:
        measure: does the work with so many images at a time, and gives the peak in bytes so far.
        most: images there are.
        budget: GB.

    Raises:
        BudgetError: not even one fits.
    """
    size, found, taken, growth, now = 1, 0, 0, 0, 0
    while taken + 2 * growth <= budget * GB:
        now = measure(size)
        if now > budget * GB:
            break
        growth = now - taken if found else 0
        found, taken = size, now
        if size == most:
            break
        size = min(2 * size, most)
    if not found:
        raise BudgetError(
            f"train.memory_budget is {budget:g} GB, and one image at a time takes {now / GB:.2f}: "
            "raise it, or choose a smaller model or base.dtype bfloat16"
        )
    return found
