"""What the package reports: log records of the logger `diffusers_fair`, and progress bars.

As in any library, records of level WARNING and above reach stderr, unless the program configures
logging. `logging.getLogger("diffusers_fair").setLevel("ERROR")` also hides the progress bars.
"""

import logging
import sys
from typing import TextIO

logger = logging.getLogger("diffusers_fair")


class _Stderr(logging.StreamHandler):
    """Writes to what is stderr at that time: a progress bar replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> TextIO:
        return sys.stderr


_STDERR = _Stderr()


def log_to_stderr(level: int) -> None:
    """Write the package's log records of this level and above to stderr."""
    logger.addHandler(_STDERR)
    logger.setLevel(level)


def shows_progress() -> bool:
    """Whether progress bars are shown: unless the logger's level is above WARNING."""
    return logger.isEnabledFor(logging.WARNING)
