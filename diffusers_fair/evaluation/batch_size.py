"""The number of images that are processed together, if the caller does not choose it."""

from collections.abc import Callable
from typing import Any

import torch

_SIZES = (24, 16, 12, 8, 6, 4, 3, 2, 1)  # few, so that small differences in free memory do not show
_ON_MPS = 4  # torch does not measure the peak memory there
_SHARE = 0.8  # of the free memory; the rest is for fragmentation


def default_batch_size(device: torch.device, process_one: Callable[[], Any]) -> int:
    """Return 24 or, on a GPU, fewer if so many images do not fit its free memory.

    Args:
        device: device that processes the images.
        process_one: processes a batch of one image, whose memory is measured.
    """
    if device.type == "cuda":
        fitting = _SHARE * _free(device) / _peak(device, process_one)
        return next((size for size in _SIZES if size <= fitting), 1)
    return _ON_MPS if device.type == "mps" else _SIZES[0]


def _peak(device: torch.device, process: Callable[[], Any]) -> int:
    """Return the memory in bytes that a call takes at most and gives back."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    process()
    return max(1, torch.cuda.max_memory_allocated(device) - before)


def _free(device: torch.device) -> int:
    """Return the memory in bytes that can be allocated, including what torch has reserved."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
