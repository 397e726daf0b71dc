"""Files and folders that are there whole or not at all, also if the power fails."""

import os
import shutil
from pathlib import Path

PARTIAL = ".partial-"  # what the name of anything unfinished starts with


def partial(path: Path) -> Path:
    """Where something is put together before it gets its name; each process has its own."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def write(file: Path, data: bytes) -> None:
    """Write a file, or leave what was there.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    unfinished = partial(file)
    try:
        with unfinished.open("wb") as opened:
            opened.write(data)
        settle(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def settle(unfinished: Path, path: Path) -> None:
    """Give a finished file, or folder of files, its name once it is on the disk."""
    for file in unfinished.iterdir() if unfinished.is_dir() else ():
        sync(file)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sweep(folder: Path) -> None:
    """Remove what was left unfinished in a folder by processes that are no more."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
