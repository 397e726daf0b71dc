"""Run a function in several processes that know one another, as a launcher would start them."""

import os
import pickle
import socket
import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def together(count: int, function, *args) -> list:
    """What function(*args) gives in each of `count` processes, in their order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _process, (count, port, Path(folder), function, args), nprocs=count, start_method="fork"
        )
        return [pickle.loads((Path(folder) / str(i)).read_bytes()) for i in range(count)]


def _process(number: int, count: int, port: int, folder: Path, function, args) -> None:
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)  # the parent's threads are not here
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    distributed.init_process_group("gloo")
    (folder / str(number)).write_bytes(pickle.dumps(function(*args)))
    distributed.barrier()
    distributed.destroy_process_group()
