"""What stops a training, and what it warns of: each says what to change."""

import errno
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATIENCE = 20  # iterations in a row that a fault may last before it is spoken of
RECOVERY = 1.1  # by which the learning rate grows back in each good update
TERMINATED = 128 + signal.SIGTERM


class TrainingStoppedError(Exception):
    """A training that stops before its end, and how to go on.

    Args:
        message: one sentence.
        code: for the command to exit with.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class NotFiniteError(ArithmeticError):
    """Images of an iteration are NaN or infinite: there is nothing to learn from."""


@dataclass
class Caution:
    """Answers updates that are not finite: they are skipped, slow the next ones, stop at last."""

    limit: int
    """Skipped updates in a row that are too many."""
    skipped: int = 0
    """In all."""
    in_a_row: int = 0
    factor: float = 1.0
    """Of the learning rate: halved by each skipped update, grows back to 1 afterwards."""

    def record(self, finite: bool) -> None:
        """Take note of an update.

        Raises:
            TrainingStoppedError: too many in a row were not finite.
        """
        if finite:
            self.in_a_row, self.factor = 0, min(1.0, self.factor * RECOVERY)
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.factor /= 2
        if self.in_a_row >= self.limit:
            raise TrainingStoppedError(
                f"images or gradients were not finite in {self.in_a_row} iterations in a row "
                "(train.max_skipped): train anew with base.dtype float32 or bfloat16 if it is "
                "float16, a lower optimizer.lr or optimizer.max_grad_norm, or from an earlier "
                "adapter (adapter.init_from)"
            )

    def state(self) -> dict[str, float]:
        """For a checkpoint; `Caution(**state)` is the same again."""
        return asdict(self)


@dataclass
class Watch:
    """Warns, once of each cause, of a training that goes nowhere."""

    lasted: dict[str, int] = field(default_factory=dict)
    """Cause -> iterations in a row, up to the last one."""
    told: set[str] = field(default_factory=set)

    def look(self, figures: dict[str, float]) -> None:
        """Look at the figures of an iteration."""
        if "faces" in figures:
            self._count(
                "no face",
                figures["faces"] == 0,
                f"no face was found in {PATIENCE} iterations in a row, and nothing is balanced "
                "without: check models.face_detector, that the prompts ask for faces, and that "
                "sampling.steps and sampling.guidance_scale give clear pictures",
            )
        for name, share in figures.items():
            kind, _, attribute = name.partition("/")
            if kind == "largest":
                self._count(
                    name,
                    share == 1,
                    "every face, or image, was seen as the same class of "
                    f"'{attribute}' in {PATIENCE} iterations in a row: check its classifier on "
                    "pictures of each class; if it is right, raise prompts.images_per_prompt or "
                    "optimizer.lr",
                )

    def clip_t(self, value: float, least: float) -> None:
        """Look at the CLIP-T of a validation."""
        self._tell(
            "clip_t",
            value < least,
            f"CLIP-T fell to {value:.3f}, below {least:.3f}, the least that the best adapter may "
            "have: raise losses.semantics, lower optimizer.lr, or allow more with "
            "train.clip_t_drop",
        )

    def _count(self, cause: str, happens: bool, message: str) -> None:
        self.lasted[cause] = self.lasted.get(cause, 0) + 1 if happens else 0
        self._tell(cause, self.lasted[cause] >= PATIENCE, message)

    def _tell(self, cause: str, happens: bool, message: str) -> None:
        if happens and cause not in self.told:
            self.told.add(cause)
            warnings.warn(message, stacklevel=4)


class Termination:
    """Inside, a SIGTERM is only noted, for the training to stop where it can be gone on from.

    Only in the main thread, which is where Python has its signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def room_on_disk(folder: Path) -> Iterator[None]:
    """Say it clearly if a disk is full.

    Raises:
        TrainingStoppedError: instead of the OSError; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise TrainingStoppedError(
            f"there is no room on the disk for '{folder}' ({error.strerror}): the last checkpoint "
            "is whole; make room and give the same command again to go on from it"
        ) from error
