"""Several processes that share an evaluation, as `accelerate launch` or `torchrun` starts them."""

import os
from datetime import timedelta

PATIENCE = timedelta(days=7)  # one process may have much more to do than another


def index() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many there are; 1 if nobody said otherwise."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet() -> None:
    """Wait until all processes are here."""
    if count() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    distributed.barrier()
