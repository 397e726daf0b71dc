"""The console that progress bars are shown on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console(*, stderr: bool = False) -> "Console":
    """Create the console of a progress bar; in a notebook, one that needs no ipywidgets.

    There, rich updates a bar only with ipywidgets. Every notebook shows plain text whose line is
    overwritten, as terminals do; without colours, so that the codes of one line do not shift the
    next.

    Args:
        stderr: whether to write to stderr. Notebooks show that as an error, so there it is stdout.
    """
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_jupyter:
        return console
    return Console(force_jupyter=False, force_terminal=True, color_system=None, width=console.width)
