"""Computes terms of the loss in micro-batches, and averages them over all processes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_fair import distributed

T = TypeVar("T")


def in_micro_batches(
    terms: Callable[[Tensor], T], images: Tensor, micro_batch: int | None
) -> list[T]:
    """Call a function with the indices (m,) of one micro-batch after another.

    If there are several, they are recomputed in the backward pass, so that only one of them is in
    memory at a time.
    """
    indices = torch.arange(len(images), device=images.device)
    parts = indices.split(micro_batch or len(images))
    if len(parts) == 1:
        return [terms(indices)]
    return [checkpoint(terms, part, use_reentrant=False) for part in parts]


def global_mean(terms: Tensor) -> tuple[Tensor, float]:
    """Average terms (n,) over the images of all processes.

    Returns:
        This process's part, with gradient, and the mean. The sum of all parts is the mean.
    """
    everywhere = torch.cat(distributed.gather(terms))
    return terms.mean() * (len(terms) / len(everywhere)), everywhere.mean().item()
