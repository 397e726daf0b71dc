"""Deterministic algorithms on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    """Use deterministic algorithms of PyTorch, cuDNN and cuBLAS within a `with` block.

    Operations that have none warn and stay as they are: training needs the gradient of resizing
    images, which has none on a GPU.

    Args:
        is_on: False leaves everything as it is.
    """
    if not is_on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    mode = torch.get_deterministic_debug_mode()
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        cudnn.benchmark, cudnn.deterministic = before
