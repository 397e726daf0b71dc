"""A lock on a folder that ends with the process that holds it, however that process ends."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from diffusers_fair import atomic, distributed

LOCK = ".lock"  # file in the folder while it is locked
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # the last two on Windows


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other launches out of a folder. All processes of a launch must enter it together.

    The main process holds the lock. A folder that is created for the lock and stays empty is
    removed again. File systems that know no locks, and folders that cannot be written to, stay
    unlocked.

    Args:
        folder: created if needed.

    Raises:
        ValueError: another launch holds the lock.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    is_held, descriptor = False, None
    if distributed.is_main():
        try:
            descriptor = _acquire(folder / LOCK)
        except _HeldError:
            is_held = True
    if distributed.any_across(is_held):
        raise ValueError(
            f"'{folder}' is being written by another process: wait until it has finished, or "
            "choose another folder"
        )
    try:
        yield
    finally:
        if descriptor is not None:
            _release(folder / LOCK, descriptor)
            for path in created:
                with suppress(OSError):  # not empty
                    path.rmdir()


def has_files(folder: Path, *besides: str) -> bool:
    """Whether a folder has files other than some, and those of launches that are starting in it.

    Args:
        folder: an existing folder.
        besides: names of the files that do not count.
    """
    return any(
        path.name not in (LOCK, *besides) and not path.name.startswith(atomic.PARTIAL)
        for path in folder.iterdir()
    )


class _HeldError(Exception):
    """Another process holds the lock."""


def _acquire(file: Path) -> int | None:
    """Lock the file; return its descriptor, or None if it cannot be locked at all."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        except OSError:  # whatever writes to the folder next will say why
            return None
        try:
            _lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
            os.close(descriptor)  # its former holder has removed the file in the meantime
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD:
                raise _HeldError from error
            return None


def _lock(descriptor: int) -> None:
    """Lock an open file until it is closed.

    Raises:
        OSError: another process has locked it, or the file system knows no locks.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        windows = import_module("msvcrt")
        windows.locking(descriptor, windows.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(file: Path, descriptor: int) -> None:
    """Remove the file while it is still locked, so that nobody else can have locked it."""
    try:
        file.unlink()
    except OSError:  # Windows removes no open files
        os.close(descriptor)
        with suppress(OSError):
            file.unlink()
    else:
        os.close(descriptor)
