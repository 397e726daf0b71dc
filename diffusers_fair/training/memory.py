"""Measures the memory that training takes, and chooses the micro-batch that fits a budget."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from diffusers_fair import distributed
from diffusers_fair.training.batch_gradient import MEMORY_OPTIONS, BatchGradient
from diffusers_fair.training.batches import Batch

GB = 1e9  # bytes


class _BudgetError(ValueError):
    """Not even one image fits the budget."""


def choose_micro_batch(gradient: BatchGradient, batch: Batch, budget: float) -> None:
    """Set `gradient.micro_batch` to the largest one whose measured memory fits a budget.

    If not even one image fits, the memory options are enabled one after the other.

    Args:
        gradient: computes the gradients.
        batch: any training batch.
        budget: budget in GB.

    Raises:
        ValueError: one image does not fit even with all memory options.
    """
    device, images = gradient.pipe.device, len(batch.noise) // distributed.world_size()
    unused = [option for option in MEMORY_OPTIONS if option not in gradient.memory_options]
    enabled = ""
    while gradient.micro_batch is None:
        try:
            gradient.micro_batch = _largest_fitting(
                lambda count: _measure(gradient, batch, count), images, budget
            )
        except _BudgetError:
            if not unused:
                raise
            enabled += f" train.{unused[0]}=true"
            gradient.save_memory(unused.pop(0))
            reset_peak(device)
    if distributed.is_main():
        warnings.warn(
            f"{gradient.micro_batch} images at a time fit train.memory_budget, {budget:g} GB: the "
            f"same as train.micro_batch={gradient.micro_batch}{enabled}",
            stacklevel=3,
        )


def _measure(gradient: BatchGradient, batch: Batch, images: int) -> int:
    """Return the peak memory in bytes after computing the gradient of some images per process."""
    noise = batch.noise[: images * distributed.world_size()]
    gradient.micro_batch = images  # applies to kept images, too, however many there are
    gradient.backward(Batch(batch.prompts[:1], noise, batch.steps), 0, use_cache=False)
    gradient.micro_batch = None
    for parameter in gradient.adapter.parameters:
        parameter.grad = None
    return distributed.max_across(peak(gradient.pipe.device))


def _largest_fitting(measure: Callable[[int], int], most: int, budget: float) -> int:
    """Find how many images at a time fit a budget, doubling from one.

    A size is tried only if twice the growth of the last doubling is still within the budget.

    Args:
        measure: micro-batch -> peak memory in bytes so far.
        most: largest micro-batch.
        budget: budget in GB.

    Raises:
        ValueError: not even one image fits.
    """
    size, fits, used, growth, current = 1, 0, 0, 0, 0
    while used + 2 * growth <= budget * GB:
        current = measure(size)
        if current > budget * GB:
            break
        growth = current - used if fits else 0
        fits, used = size, current
        if size == most:
            break
        size = min(2 * size, most)
    if not fits:
        raise _BudgetError(
            f"train.memory_budget is {budget:g} GB, but one image at a time takes "
            f"{current / GB:.2f}: raise it, or choose a smaller model or base.dtype bfloat16"
        )
    return fits


def peak(device: torch.device) -> int:
    """Return the peak memory in bytes: that of torch on a GPU, that of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory; on the CPU this is only possible on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_bytes(b"5")
