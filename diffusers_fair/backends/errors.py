"""Errors while a third-party model is loaded -> one sentence that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


@contextmanager
def loading(
    what: str, advice: str, install: str = "pip install 'diffusers-fair[train]'"
) -> Iterator[None]:
    """Turn errors inside into one sentence that says why the model cannot be loaded.

    Args:
        what: the model, as in "the image encoder 'x'".
        advice: what was expected and what to do.
        install: command that installs the packages it needs.

    Raises:
        ModuleNotFoundError: a package is missing.
        ValueError: any other error: no such model, no network, files that do not fit.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs the package '{error.name}': {install}", name=error.name
        ) from error
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = shorten((lines or [type(error).__name__])[0], 250)
        raise ValueError(f"cannot load {what}: {reason}; expected {advice}") from error
