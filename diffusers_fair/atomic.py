"""Atomic writes: a file or folder is complete or absent, even after a power failure."""

import os
import shutil
from pathlib import Path

PARTIAL = ".partial-"  # prefix of the names of unfinished files and folders


def partial_path(path: Path) -> Path:
    """Return the temporary path to write to before `finish`; it differs between processes."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def write(file: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: the file cannot be written; an older version of it is unchanged.
    """
    unfinished = partial_path(file)
    try:
        with unfinished.open("wb") as opened:
            opened.write(data)
        finish(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def finish(unfinished: Path, path: Path) -> None:
    """Flush a file, or a folder of files, to the disk, then rename it to its final path."""
    for file in unfinished.iterdir() if unfinished.is_dir() else ():
        fsync(file)
    fsync(unfinished)
    os.replace(unfinished, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    is_folder = path.is_dir()
    try:  # Windows flushes only what is open for writing
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Remove the unfinished files and folders that stopped processes left in a folder."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
