"""One-sentence errors for third-party models that cannot be loaded."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

_BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)  # if from this package


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
        ValueError: any other error, such as an unknown model, no network or wrong files, except
            programming errors of this package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs the package '{error.name}': {install}", name=error.name
        ) from error
    except Exception as error:  # the libraries' own classes of errors have no common base
        if isinstance(error, _BUGS) and _is_from_this_package(error):
            raise
        reason = _reason(error)
        raise ValueError(f"cannot load {what}: {reason}; expected {advice}") from error


def _reason(error: BaseException) -> str:
    """Say on one line why a model cannot be loaded."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):  # libraries call it a repository that does not exist
            return (
                "its publisher asks you to accept its licence: do so on its page on the Hub, then "
                "run `hf auth login`"
            )
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten((lines or [type(error).__name__])[0], 250)


def _is_from_this_package(error: Exception) -> bool:
    """Whether a line of this package raised the error, rather than a library, as of wrong files."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
