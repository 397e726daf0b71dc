"""Measures the memory that training takes, chooses the micro-batch that fits, and gives advice."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from diffusers_fair import distributed
from diffusers_fair.config.schema import MEMORY_OPTIONS
from diffusers_fair.training.batch_gradient import BatchGradient
from diffusers_fair.training.batches import Batch
from diffusers_fair.training.stopping import TrainingStoppedError

logger = logging.getLogger(__name__)

GB = 1e9  # bytes
_OUT_OF_MEMORY = sys.maxsize  # bytes; stands for a measurement that ran out of memory
_CONTEXT = 1.0  # GB; more than the CUDA context and the libraries' kernels take
_MARGIN = 0.05  # of the GPU's memory, for the optimizer's state and fragmentation ...
_LEAST_MARGIN = 0.5  # ... but at least this many GB

MODELS_DO_NOT_FIT = (
    "the models do not fit in the GPU's memory: set base.dtype=bfloat16 if it is float32, or "
    "choose a smaller base.model, models.clip or models.dino"
)


class _BudgetError(ValueError):
    """Not even one image fits the budget."""


# ---- choosing the micro-batch --------------------------------------------------------------------


def choose_micro_batch(
    gradient: BatchGradient, batch: Batch, budget: float | Literal["auto"]
) -> None:
    """Set `gradient.micro_batch` to the largest one whose measured memory fits a budget.

    If not even one image fits, the memory options are enabled one after the other.

    Args:
        gradient: computes the gradients.
        batch: any training batch.
        budget: budget in GB; `auto` is what the GPU has free, and nothing is chosen on the CPU.

    Raises:
        ValueError: one image does not fit even with all memory options.
    """
    limit = _limit(budget, gradient.pipe.device)
    if limit is None:
        return
    images = len(batch.noise) // distributed.world_size()
    unused = unused_options(gradient)
    enabled = ""
    while gradient.micro_batch is None:
        try:
            gradient.micro_batch = _largest_fitting(
                lambda count: _measure(gradient, batch, count), images, limit
            )
        except _BudgetError:
            if not unused:
                raise
            enabled += f" train.{unused[0]}=true"
            gradient.save_memory(unused.pop(0))
    if distributed.is_main():
        logger.log(
            logging.WARNING if enabled else logging.INFO,  # the options make training slower
            f"{gradient.micro_batch} images at a time fit train.memory_budget, {limit:.3g} GB: the "
            f"same as train.micro_batch={gradient.micro_batch}{enabled}",
        )


def unused_options(gradient: BatchGradient) -> list[str]:
    """Return the memory options that are not enabled, the cheapest first."""
    return [option for option in MEMORY_OPTIONS if option not in gradient.memory_options]


def _limit(budget: float | Literal["auto"], device: torch.device) -> float | None:
    """Return the budget in GB, the same in every process; None for no budget."""
    usable = capacity(device)
    if usable is None:
        return None if budget == "auto" else budget
    usable = -distributed.max_across(-usable)  # of the GPU that has the least
    if budget != "auto" and budget * GB <= usable:
        return budget
    if budget != "auto" and distributed.is_main():
        logger.warning(
            f"train.memory_budget is {budget:g} GB, but only {usable / GB:.3g} GB of the GPU are "
            "usable: they are the budget instead"
        )
    return usable / GB


def _measure(gradient: BatchGradient, batch: Batch, images: int) -> int:
    """Return the peak memory in bytes while the gradient of some images is computed.

    Every process measures its own images without the others: one that runs out of memory would
    leave them waiting for it.
    """
    part = Batch(batch.prompts[:1], batch.noise[:images], batch.steps)
    gradient.micro_batch = images  # applies to kept images, too, however many there are
    reset_peak(gradient.pipe.device)
    with distributed.alone():
        try:
            gradient.backward(part, 0, use_cache=False)
            used = peak(gradient.pipe.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            used = _OUT_OF_MEMORY
    gradient.micro_batch = None
    for parameter in gradient.adapter.parameters:
        parameter.grad = None
    return distributed.max_across(used)


def _largest_fitting(measure: Callable[[int], int], most: int, budget: float) -> int:
    """Find how many images at a time fit a budget, doubling from one.

    A size is tried only if twice the growth of the last doubling is still within the budget.

    Args:
        measure: micro-batch -> peak memory in bytes.
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
        takes = "more than there is" if current == _OUT_OF_MEMORY else f"{current / GB:.2f}"
        raise _BudgetError(
            f"train.memory_budget is {budget:.3g} GB, but one image at a time takes {takes}: raise "
            "it, or choose a smaller base.model or models.clip, or base.dtype bfloat16"
        )
    return fits


# ---- running out of memory -----------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is no memory left, on any device."""
    text = str(error).lower()  # only CUDA and XPU have a class for it
    phrases = "out of memory", "can't allocate memory", "cublas_status_alloc_failed"
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
    )


@contextmanager
def explain_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Replace the error of a device without memory by one with advice; other errors pass.

    Args:
        advice: returns the message.

    Raises:
        TrainingStoppedError: there is no memory left.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # a notebook would keep their tensors
        raise TrainingStoppedError(advice()) from error


def how_to_save_memory(gradient: BatchGradient) -> str:
    """Say which keys make training and validation take less memory, and their values now."""
    train = gradient.config.train
    images = train.prompts_per_iteration * gradient.config.prompts.images_per_prompt
    size = gradient.micro_batch or images // distributed.world_size()
    advice = [f"train.{option}=true" for option in unused_options(gradient)]
    if size > 1:
        budget = " train.memory_budget=null" if isinstance(train.memory_budget, float | int) else ""
        advice.insert(0, f"train.micro_batch={size // 2}{budget}")
    now = gradient.micro_batch or "null"
    if not advice:
        return (
            f"out of memory with train.micro_batch {now} and all memory options: start another "
            "run, in a new output folder, with a smaller models.clip or base.dtype=bfloat16 (now "
            f"{gradient.config.base.dtype})"
        )
    return (
        f"out of memory with train.micro_batch {now}: set {', then '.join(advice)}, and give the "
        "same command again to resume from the last checkpoint"
    )


# ---- figures -------------------------------------------------------------------------------------


def capacity(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process can use in all, less a margin; None on the CPU.

    It is what the process uses already, as `peak` counts it, and what is free.
    """
    if device.type == "mps":
        usable = total = torch.mps.recommended_max_memory()
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usable = free + torch.cuda.memory_reserved(device) + _outside_torch(device)
    else:
        return None
    return usable - int(max(_MARGIN * total, _LEAST_MARGIN * GB))


def peak(device: torch.device) -> int:
    """Return the peak memory of the process in bytes.

    On a GPU, it includes what torch has reserved without using it, and the CUDA context. On MPS, it
    is the memory that torch has reserved.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + _outside_torch(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def reset_peak(device: torch.device) -> None:
    """Free unused memory and reset the peak; on the CPU this is only possible on Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_bytes(b"5")


def _outside_torch(device: torch.device) -> int:
    """Return the bytes that the CUDA context takes; other programs' memory may count, up to 1 GB.

    CUDA does not tell them apart.
    """
    free, total = torch.cuda.mem_get_info(device)
    return min(total - free - torch.cuda.memory_reserved(device), int(_CONTEXT * GB))
