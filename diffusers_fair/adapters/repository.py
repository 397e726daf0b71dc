"""Finds an adapter: a folder, or a repository on the Hub, which is downloaded to the cache."""

import errno
import re
from collections.abc import Sequence
from contextlib import suppress
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_fair.adapters.folder import Adapter, check_size, open_adapter
from diffusers_fair.adapters.format import MAX_BYTES
from diffusers_fair.paths import expand

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # a repository id on the Hub
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # errors of a cache that cannot be written


def open_fair_adapter(
    id_or_dir: str | Path | Adapter, revision: str | None = None, token: str | bool | None = None
) -> Adapter:
    """Find, check and read an adapter once, to load it several times.

    Args:
        id_or_dir: as in `load_fair_adapter`; an open adapter is returned as it is.
        revision: branch, tag or commit of the repository.
        token: access token for a private repository.

    Raises:
        ValueError: the adapter is not found, damaged, of another format version or invalid.
    """
    if isinstance(id_or_dir, Adapter):
        return id_or_dir
    return open_adapter(local_folder(id_or_dir, revision, token))


def local_folder(
    id_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return a folder as it is, or download a Hub repository to the cache and return that folder.

    Raises:
        ValueError: no such folder or repository, or the download fails.
    """
    if (folder := expand(id_or_dir)).is_dir():
        return folder
    repository = str(id_or_dir)
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"there is no adapter folder at '{id_or_dir}'")

    from huggingface_hub import errors

    try:
        return _download(repository, revision, token)
    except errors.RepositoryNotFoundError:
        reason = "no repository on the Hub that you may read (if it is private, pass token=)"
    except errors.RevisionNotFoundError:
        reason = f"its repository on the Hub has no revision '{revision}'"
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the local cache, and the Hub cannot be reached"
    except (OSError, errors.HTTPError, JSONDecodeError) as error:
        if isinstance(error, OSError) and error.errno in _READ_ONLY:
            raise ValueError(
                f"the adapter '{repository}' on the Hub is not in the local cache, which cannot be "
                "written: make the cache writable, or pass a revision that is in it"
            ) from error
        reason = f"the Hub answered with an error, or broke off ({type(error).__name__})"
    raise ValueError(f"there is no adapter folder at '{repository}', and {reason}")


def _download(repository: str, revision: str | None, token: str | bool | None) -> Path:
    """Download the files of a repository after checking their sizes."""
    from huggingface_hub import errors, snapshot_download

    options: dict[str, Any] = {"revision": revision, "token": token}
    options["allow_patterns"] = list(MAX_BYTES)
    files: Sequence[DryRunFileInfo] = ()
    with suppress(errors.DryRunError):  # offline: snapshot_download below uses the cache or raises
        files = snapshot_download(repository, dry_run=True, **options)
    for file in files:
        check_size(f"{repository}/{file.filename}", file.filename, file.file_size or 0)
    try:
        return Path(snapshot_download(repository, **options))
    except OSError as error:
        folder = None
        if error.errno in _READ_ONLY:
            folder = _earlier_snapshot(repository, files, token)
        if folder is None:
            raise
        return folder


def _earlier_snapshot(
    repository: str, files: "Sequence[DryRunFileInfo]", token: str | bool | None
) -> Path | None:
    """Find the files of a commit in the cache, in the folder of a commit before it.

    A read-only cache has no folder for a new commit, which may have changed the card alone. The
    cache consists of links to files that are named by their hashes.
    """
    from huggingface_hub import HfApi, RepoFile

    if not files:
        return None
    tree = HfApi(token=token).list_repo_tree(repository, revision=files[0].commit_hash)
    hashes = {x.path: {x.blob_id, x.lfs and x.lfs.sha256} for x in tree if isinstance(x, RepoFile)}
    for folder in Path(files[0].local_path).parent.parent.glob("*"):
        paths = {file.filename: folder / file.filename for file in files}
        if all(x.is_file() and x.resolve().name in hashes[name] for name, x in paths.items()):
            return folder
    return None
