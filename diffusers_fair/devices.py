"""Devices: which one a name stands for, and the data type that suits it."""

import os
import re
from typing import Any

import torch

_NAMES = "auto, cuda, cuda:N, mps or cpu"


def checked_device(name: str) -> str:
    """Return the name of a device, `auto`, `cuda`, `cuda:N`, `mps` or `cpu`.

    Raises:
        ValueError: any other name.
    """
    if not re.fullmatch(r"auto|cuda(:[0-9]{1,3})?|mps|cpu", name):
        raise ValueError(f"expected a device, {_NAMES}, got '{name}'")
    return name


def choose_device(name: str = "auto") -> torch.device:
    """Choose the device of this process.

    Among the processes that `accelerate launch` or `torchrun` starts on a machine, each has a GPU
    of its own, by its local rank; it becomes torch's current GPU, too.

    Args:
        name: `auto`: the GPU of this process if there is one, else MPS, else the CPU; always the
            CPU under `accelerate launch --cpu`. `cuda`: the GPU of this process. `cuda:N`: that
            GPU. `mps`. `cpu`.

    Raises:
        ValueError: an unknown name, or a device that is not available.
    """
    kind, _, index = checked_device(name).partition(":")
    if kind == "auto":
        kind = _first_available()
    if kind == "cuda":
        return _gpu(name, index)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device 'mps' is not available: torch {torch.__version__} finds no Apple GPU; choose "
            "auto or cpu"
        )
    return torch.device(kind)


def _first_available() -> str:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _gpu(name: str, index: str) -> torch.device:
    """Return the GPU of that index, or the one of this process if the index is empty."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(
            f"device '{name}' is not available: torch {torch.__version__} finds no GPU; install a "
            "build of torch for your GPU, or choose auto or cpu"
        )
    local_rank = os.environ.get("LOCAL_RANK")
    # some launchers show each process only its own GPU
    device = torch.device("cuda", int(index) if index else int(local_rank or 0) % count)
    if device.index >= count:
        raise ValueError(
            f"device '{name}' is not available: torch finds {count} GPUs, cuda:0 to "
            f"cuda:{count - 1}; choose one of them, or auto"
        )
    if local_rank is not None:
        torch.cuda.set_device(device)  # or libraries would take memory of the first GPU
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a data type.

    Args:
        name: float32, bfloat16 or float16; or auto: bfloat16 if the device is fast in it, else
            float32. GPUs are from compute capability 8.0 on (Ampere), and processors with AMX; MPS
            is not.
        device: the device of the model.

    Raises:
        ValueError: an unknown name.
    """
    known = {d: getattr(torch, d) for d in ("float32", "bfloat16", "float16")}
    if name != "auto":
        if name not in known:
            raise ValueError(f"expected a data type, auto, {', '.join(known)}, got '{name}'")
        return known[name]
    return torch.bfloat16 if _is_fast_in_bfloat16(device) else torch.float32


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # avx512_bf16 alone is slower
        return torch.cpu.get_capabilities().get("amx_bf16", False)
    return False


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe a device as JSON data: its name and, for a GPU, model, memory and driver."""
    if device.type != "cuda":
        return {"device": str(device)}
    from torch.utils import collect_env

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "gpu": properties.name,
        "gpu memory in GB": round(properties.total_memory / 1e9, 1),
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "cuda": torch.version.cuda or torch.version.hip,
    }
