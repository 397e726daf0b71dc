"""The command-line application: its output, how it is stopped, and its exit codes."""

import errno
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from diffusers_fair.training.stopping import StoppedError, Terminated, exit_code, raise_on_sigterm
from diffusers_fair.verbosity import log_to_stderr
from diffusers_fair.version import __version__

if TYPE_CHECKING:
    from diffusers_fair.assess import Assessment


class _Commands(TyperGroup):
    """Turns Ctrl-C and SIGTERM into one sentence on how to go on, and their exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            message = str(stop) or "stopped"
            raise StoppedError(
                f"{message}: give the same command again to go on", exit_code(number)
            ) from stop


class Resumable(TyperCommand):
    """A command that resumes what it finds in its folder `--out`."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command."""
        with resumable(Path(ctx.params["out"])):
            return super().invoke(ctx)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """If the user stops the command, say where its work is."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not stop.args and folder.exists():
            stop.args = (f"stopped, with what was finished in '{folder}'",)
        raise


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, evaluate, share and load fairness adapters for Hugging Face diffusers.",
)
logger = logging.getLogger(__name__)
console = Console(markup=False, highlight=False)  # what it prints is data


def _print_version(asked: bool) -> None:
    if asked:
        say(f"diffusers-fair {__version__}")
        raise typer.Exit


@app.callback()
def _configure(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Log only errors, and show no progress bars.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log more, and print the traceback of every error."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("expected --quiet or --verbose, got both: choose one of them")
    log_to_stderr(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def say(text: str) -> None:
    """Print a line without wrapping."""
    console.print(text, soft_wrap=True)


def show_assessment(assessment: "Assessment", out: Path) -> None:
    """Print the table of an assessment, its notes and its warning."""
    from diffusers_fair.reports.table import table

    grid = table(assessment.base, assessment.changed)
    show(grid, out, assessment.warning, assessment.transfer)


def show(grid: Any, out: Path, warning: str = "", notes: Sequence[str] = ()) -> None:
    """Print a report's table, notes and a warning, from the main process."""
    from diffusers_fair import distributed

    if distributed.is_main():
        console.print(grid)
        for note in notes:
            say(note)
        if warning:
            say(f"Warning: {warning}")
        say(f"report in {out}")


def main() -> None:
    """Run the command line, and exit.

    Exit codes: 0 success; 2 invalid input, with a message of one sentence; 130 stopped by Ctrl-C
    and 143 by SIGTERM, with a message on how to go on; 1 any other error.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with raise_on_sigterm():
            if code := app(standalone_mode=False):  # that of `typer.Exit`
                sys.exit(code)
    except typer.Abort:
        sys.exit(1)
    except StoppedError as stop:
        sys.stderr.write(f"diffusers-fair: {stop}\n")
        sys.exit(stop.code)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        logger.debug("traceback of the error below", exc_info=True)
        if sentence:  # empty after the help that a command without arguments prints
            sys.stderr.write(f"diffusers-fair: {sentence}\n")
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """Describe an error that is due to the user's input; None for any other error."""
    from typer._click.exceptions import ClickException

    if isinstance(error, ClickException):
        return error.format_message()  # names the option
    if isinstance(error, ValueError | ModuleNotFoundError):
        return str(error)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        where = f"'{error.filename}'" if error.filename else "a file"
        return f"cannot read or write {where}: {error.strerror}; choose another path, or mend it"
    return None
