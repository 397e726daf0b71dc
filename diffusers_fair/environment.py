"""The environment, as a bug report needs it: versions and devices, without personal paths."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from diffusers_fair import strict_json
from diffusers_fair.devices import choose_device, describe_device
from diffusers_fair.provenance import commit
from diffusers_fair.version import __version__

PACKAGES = (
    *("torch", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors", "numpy"),
    *("torchvision", "accelerate", "open_clip_torch", "scipy", "pydantic", "pyyaml", "typer"),
    *("rich", "matplotlib", "jinja2", "tensorboard", "pyarrow"),
    *("timm", "retinaface-pytorch", "bitsandbytes", "xformers"),  # optional
)
_VARIABLES = (  # their values change results or errors, and hold no path
    "ACCELERATE_USE_CPU",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE",
)


def describe_environment() -> dict[str, Any]:
    """Describe the environment as JSON data."""
    return {
        "diffusers-fair": __version__,
        "commit": commit(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch build": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        "cores": os.cpu_count(),
        "memory in GB": _memory(),
        "devices": [describe_device(device) for device in _devices()],
        "default device": str(choose_device("auto")),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def environment_text(as_json: bool = False) -> str:
    """Describe the environment as JSON, or as a Markdown list to paste into an issue."""
    facts = describe_environment()
    if as_json:
        return strict_json.dumps(facts, indent=2)
    devices = facts.pop("devices")
    facts |= {f"device {d.pop('device')}": _join(d) for d in devices}
    facts |= {f"package {name}": version for name, version in facts.pop("packages").items()}
    facts |= {f"variable {name}": value for name, value in facts.pop("variables").items()}
    lines = (f"- {name}: {'none' if fact is None else fact}" for name, fact in facts.items())
    return "\n".join(lines)


def _join(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or "available"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    """List the devices that torch finds, the CPU last."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [torch.device(name) for name in (*(f"cuda:{i}" for i in range(count)), *mps, "cpu")]


def _memory() -> float | None:
    """Return the machine's memory in GB; None if the system does not say, as Windows."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None
