"""Reasons to stop early, each with advice on how to resume."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ECHO = 1.0  # seconds in which a launcher may pass on a Ctrl-C that the process has already got


class StoppedError(Exception):
    """A command has stopped early.

    Args:
        message: one sentence on the reason and on how to resume.
        code: exit code of the command.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class TrainingStoppedError(StoppedError):
    """Training has stopped early."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived, which stops a command as Ctrl-C does."""


def exit_code(number: int) -> int:
    """Return the exit code of a command that a signal has stopped."""
    return 128 + number


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that it unwinds as Ctrl-C does."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class SignalHandler:
    """Defers SIGTERM and the first Ctrl-C until the work has been saved.

    A second Ctrl-C interrupts at once. A signal that the `with` block has not answered by an error
    is raised at its end. Python handles signals in the main thread only: in other threads this does
    nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal; 0 if there was none."""
        self._time = 0.0  # of the first signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as shells do for `command &`
                    self._previous[number] = signal.signal(number, self._defer)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.received and error is None:
            raise Terminated if self.received == signal.SIGTERM else KeyboardInterrupt

    def _defer(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._time = number, time.monotonic()
            os.write(2, b"\nstopping once the work is saved; Ctrl-C again stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - self._time > _ECHO:
            raise KeyboardInterrupt


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
