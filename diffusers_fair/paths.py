"""Paths that users give: `~` is expanded, and a folder is checked before hours of work."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """Replace a leading `~` by the home folder; that of an unknown user stays as it is.

    Raises:
        ValueError: an empty text, which would be the current folder.
    """
    if path == "":
        raise ValueError("expected the path of a file or folder, got an empty text")
    return Path(os.path.expanduser(path))


def require_writable(folder: str | Path) -> Path:
    """Check that a folder can be created and written to, without creating it; return its path.

    Raises:
        ValueError: the path leads through a file, or may not be written to.
    """
    folder = expand(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"'{folder}' cannot be a folder, as '{existing}' is a file: choose another folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"'{folder}' cannot be written: no permission to write to '{existing}'; choose another "
            "folder"
        )
    return folder
