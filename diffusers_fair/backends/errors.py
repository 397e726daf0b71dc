"""One-sentence errors for third-party models that cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


@contextmanager
def loading(
    what: str, advice: str, install: str = "pip install 'diffusers-fair[train]'"
) -> Iterator[None]:
    """Turn errors in this context into one sentence that says why the model cannot be loaded.

    Args:
        what: the model, for example "the image encoder 'x'".
        advice: what a recipe should name instead, and what to do.
        install: command that installs the packages that the model needs.

    Raises:
        ModuleNotFoundError: a package is missing.
        ValueError: any other error, such as an unknown model, no network or wrong files.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs the package '{error.name}': {install}", name=error.name
        ) from error
    except Exception as error:  # the libraries' own classes of errors have no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = shorten((lines or [type(error).__name__])[0], 250)
        raise ValueError(f"cannot load {what}: {reason}; expected {advice}") from error
