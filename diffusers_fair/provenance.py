"""Where figures come from: command, commit, versions, machine, time."""

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

ROOT = Path(__file__).parents[1]  # of the checkout, unless the package is installed elsewhere
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")


def provenance() -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def command() -> str:
    """The command line, without the place of the program."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    words = ["python", "-m", program.parent.name] if module else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def commit() -> str | None:
    """Of the git checkout that the package is in; None if it is installed elsewhere."""
    if not (ROOT / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    own = {"python": platform.python_version(), "diffusers-fair": __version__}
    return own | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch

    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
