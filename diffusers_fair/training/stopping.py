"""Reasons to stop training early, each with advice on how to resume."""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

TERMINATED = 128 + signal.SIGTERM  # exit code
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainingStoppedError(Exception):
    """Training has stopped early.

    Args:
        message: one sentence on the reason and on how to resume.
        code: exit code of the command.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class SigtermHandler:
    """Defers SIGTERM until the current iteration has been checkpointed.

    Python handles signals in the main thread only: in other threads this does nothing.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._previous: Any = None

    def __enter__(self) -> "SigtermHandler":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, signal_number: int, frame: FrameType | None) -> None:
        self.is_requested = True


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Replace the OSError of a full disk by an error with advice; other errors pass.

    Raises:
        TrainingStoppedError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise TrainingStoppedError(
            f"there is no room on the disk for '{folder}' ({error.strerror}): the last checkpoint "
            "is intact; free some space and give the same command again to resume from it"
        ) from error
