"""The processes of a training, and what they tell one another; alone, one is all there is.

What is shared is small and is shared through the CPU, in order of the processes' numbers. Whoever
starts the training joins the processes (`torch.distributed`); everything here is for all to call.
"""

import torch
from torch import Tensor, distributed


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def number() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def main() -> bool:
    """Whether this is the one that writes files and speaks."""
    return number() == 0


def share(items: int) -> slice:
    """The part of a row of items that is this process's; the first ones have one more.

    Raises:
        ValueError: there are fewer items than processes.
    """
    if items < count():
        raise ValueError(
            f"{items} images an iteration cannot be shared by {count()} processes: start fewer, "
            "or raise prompts.images_per_prompt or train.prompts_per_iteration"
        )
    part = torch.arange(items).tensor_split(count())[number()]
    return slice(int(part[0]), int(part[-1]) + 1)


def gather(rows: Tensor) -> list[Tensor]:
    """Rows (m, ...) of every process, m its own, without gradient."""
    rows = rows.detach()
    if count() == 1:
        return [rows]
    found: list[Tensor] = [rows] * count()
    distributed.all_gather_object(found, rows.cpu())
    return [part.to(rows.device) for part in found]


def add_up(tensors: list[Tensor]) -> None:
    """Put in place of each tensor its sum over the processes."""
    if count() == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(whole)
    for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_of(flag: bool) -> bool:
    """Whether it is so for any of the processes."""
    return bool(torch.cat(gather(torch.tensor([flag]))).any())


def most(value: int) -> int:
    """The largest of the processes' values."""
    return int(torch.cat(gather(torch.tensor([value]))).max())


def wait() -> None:
    """Until all are here."""
    gather(torch.zeros(0))
