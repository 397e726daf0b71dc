"""The processes that `accelerate launch` or `torchrun` starts, and the values they exchange.

A single process exchanges nothing. Exchanged values are small: they travel through the CPU, so that
processes may compute on any devices, and are returned in rank order. Every process must make the
same calls in the same order.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

_TIMEOUT = timedelta(days=7)  # the others wait while one validates, or evaluates its last images


_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Take this process for the only one within a `with` block, so that it exchanges nothing."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def world_size() -> int:
    """Number of processes."""
    if _is_alone:
        return 1
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Rank of this process, from 0."""
    if _is_alone:
        return 0
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def connect() -> None:
    """Create a process group if there are several processes and none exists."""
    if world_size() > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_TIMEOUT)


def _group() -> Any:
    """Return the process group for values on the CPU."""
    connect()
    return _gloo(distributed.group.WORLD)


@cache
def _gloo(world: Any) -> Any:
    """Return the group of all processes or, if it only works between GPUs, another one."""
    if distributed.get_backend(world) == "gloo":
        return world
    return distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def shard(items: int) -> slice:
    """Return this process's slice of a sequence; the first ranks may get one item more.

    Raises:
        ValueError: there are fewer items than processes.
    """
    if items < world_size():
        raise ValueError(
            f"{items} images per iteration cannot be shared by {world_size()} processes: start "
            "fewer processes, or raise prompts.images_per_prompt or train.prompts_per_iteration"
        )
    part = torch.arange(items).tensor_split(world_size())[rank()]
    return slice(int(part[0]), int(part[-1]) + 1)


def gather(rows: Tensor) -> list[Tensor]:
    """Gather rows (m, ...) from every process, without gradient; m may differ between processes."""
    rows = rows.detach()
    if world_size() == 1:
        return [rows]
    parts: list[Tensor] = [rows] * world_size()
    distributed.all_gather_object(parts, rows.cpu(), group=_group())
    return [part.to(rows.device) for part in parts]


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world_size() == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    distributed.all_reduce(whole, group=_group())
    for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_across(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(torch.cat(gather(torch.tensor([flag]))).any())


def max_across(value: int) -> int:
    """Return the largest value over all processes."""
    return int(torch.cat(gather(torch.tensor([value]))).max())


def barrier() -> None:
    """Wait until every process has called this."""
    gather(torch.zeros(0))
