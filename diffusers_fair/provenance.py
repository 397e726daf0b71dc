"""Provenance of results: command, commit, versions, machine, time."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers_fair.version import __version__

ROOT = Path(__file__).parents[1]  # root of the git checkout, if the package runs from one
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def provenance(device: Any = "cpu") -> dict[str, Any]:
    """Return the provenance of a result as JSON data.

    Args:
        device: device that made the result.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(device),
    }


def command() -> str:
    """Return the command line, without the path of the program."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    words = ["python", "-m", program.parent.name] if module else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def commit() -> str | None:
    """Return the commit of the git checkout that the package runs from; None if it is installed."""
    if not (ROOT / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # git is not installed
        return None
    return result.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    base = {"python": platform.python_version(), "diffusers-fair": __version__}
    return base | {name: version(name) for name in _PACKAGES}


def machine(device: Any = "cpu") -> dict[str, Any]:
    """Describe the machine and the device that made a result on it."""
    import torch

    from diffusers_fair.devices import describe_device

    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **describe_device(torch.device(device)),
    }
