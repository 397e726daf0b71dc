"""The processes that `accelerate launch` or `torchrun` starts, and the values they exchange.

A single process needs nothing of it. Exchanged values are small and travel through the CPU, in the
order of the ranks. Every process has to make the same calls.
"""

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(days=7)  # an evaluation's processes may have very different amounts of work


def world_size() -> int:
    """Number of processes."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Rank of this process, from 0."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def join() -> None:
    """Connect the processes on the CPU, unless there is one or they are connected already."""
    if world_size() > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)


def shard(items: int) -> slice:
    """This process's part of a sequence; the first ranks get one item more.

    Raises:
        ValueError: there are fewer items than processes.
    """
    if items < world_size():
        raise ValueError(
            f"{items} images an iteration cannot be shared by {world_size()} processes: start "
            "fewer, or raise prompts.images_per_prompt or train.prompts_per_iteration"
        )
    part = torch.arange(items).tensor_split(world_size())[rank()]
    return slice(int(part[0]), int(part[-1]) + 1)


def gather(rows: Tensor) -> list[Tensor]:
    """Rows (m, ...) of every process, without gradient; m may differ between processes."""
    rows = rows.detach()
    if world_size() == 1:
        return [rows]
    join()
    found: list[Tensor] = [rows] * world_size()
    distributed.all_gather_object(found, rows.cpu())
    return [part.to(rows.device) for part in found]


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world_size() == 1:
        return
    join()
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(whole)
    for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_across(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(torch.cat(gather(torch.tensor([flag]))).any())


def max_across(value: int) -> int:
    """The largest value of all processes."""
    return int(torch.cat(gather(torch.tensor([value]))).max())


def barrier() -> None:
    """Wait until every process has called this."""
    gather(torch.zeros(0))
