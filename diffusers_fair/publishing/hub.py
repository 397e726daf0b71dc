"""Pushes adapter folders and Spaces to the Hub, after checking them, in one commit or none at all.

Only the Hub's client retries requests. A failed push leaves the Hub unchanged, says so, and can be
repeated.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    SpaceInfo,
    errors,
    get_token,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from diffusers_fair import atomic
from diffusers_fair.adapters.folder import (
    EXPORTS_FOLDER,
    README_FILE,
    REPORT_FILES,
    SAMPLES_FOLDER,
    Adapter,
    open_adapter,
)
from diffusers_fair.adapters.format import EMBEDS_FILE, INFO_FILE, WEIGHTS_FILE
from diffusers_fair.families.other_programs import PROGRAMS
from diffusers_fair.paths import expand
from diffusers_fair.publishing.card import card_text
from diffusers_fair.publishing.export import exported_files
from diffusers_fair.publishing.space import SPACE_FILES, SPACE_FOLDERS

_MAIN = "main"
_NAMES = (INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE, README_FILE, *REPORT_FILES)
_HUB_NAMES = {".gitattributes", "LICENSE", README_FILE}  # files of a new repository


_Info: TypeAlias = ModelInfo | SpaceInfo


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of repository."""

    name: str
    """What it holds, in words."""
    repo_type: str
    mark: str
    """File that every repository of this kind has."""
    is_published: Callable[[str], bool]
    """Whether a file of this name belongs to it."""
    creation: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that create it."""

    @property
    def path(self) -> str:
        """Path of its repositories in URLs."""
        return "" if self.repo_type == "model" else f"{self.repo_type}s/"


@dataclass(frozen=True, kw_only=True)
class Push:
    """The result of a push, or of a dry run."""

    repo_id: str
    files: dict[str, int]
    """Name in the repository -> size in bytes, of all files of the adapter."""
    removed: tuple[str, ...] = ()
    """Files of an earlier push that this push removes."""
    url: str | None = None
    """URL of the commit or pull request; None in a dry run, or if nothing has changed."""


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    export: Sequence[str] = (),
) -> Push:
    """Publish an adapter folder: weights, card, samples, report and exports in one commit.

    Pushing the same files again makes no commit. If anything fails, a repository or branch that was
    created for the push is deleted again.

    Args:
        folder: adapter folder; its card is written if it has none. Files that belong neither to the
            adapter nor to its report are not published.
        repo_id: `user-or-organisation/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: branch to commit to, created from `main` if it does not exist; or `refs/pr/N`, to
            add to a pull request.
        create_pr: open a pull request instead of committing.
        message: commit message.
        token: Hub token, neither printed nor stored. Default: `HF_TOKEN`, or the token of
            `hf auth login`.
        dry_run: check the folder and list what would be pushed, without any request or file.
        export: programs, as in `export_adapter`, for which the adapter is written to
            `exports/PROGRAM` in its folder first.

    Raises:
        KeyboardInterrupt: Ctrl-C; the message says in what state the repository is.
        ValueError: the folder is not an adapter, there is no token, the repository holds something
            else, or the Hub refuses. The message also says in what state the repository is.
    """
    folder = expand(folder)
    adapter = open_adapter(folder)
    files = _folder_files(folder)
    _check_repo_id(repo_id)
    if create_pr and revision not in (None, _MAIN):
        raise ValueError(f"a pull request goes to {_MAIN}: leave out the revision '{revision}'")
    added = _exports(adapter, export)
    if README_FILE not in files:
        added[README_FILE] = card_text(adapter).encode()
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sizes = dict(sorted((sizes | {name: len(data) for name, data in added.items()}).items()))
    if dry_run:
        return Push(repo_id=repo_id, files=sizes)
    for name, data in added.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / name, data)
    files = _folder_files(folder)
    info = adapter.info
    message = message or f"Adapter of {', '.join(info.components)} for {info.base_model}"
    attempt = _Attempt(_ADAPTER, _api(token), repo_id, revision or _MAIN, files)
    url = attempt.run(private, create_pr, message)
    return Push(repo_id=repo_id, files=sizes, removed=attempt.removed if url else (), url=url)


def _exports(adapter: Adapter, programs: Sequence[str]) -> dict[str, bytes]:
    """Map names in the repository to the contents of files for other programs."""
    return {
        f"{EXPORTS_FOLDER}/{program}/{file.name}": file.content
        for program in programs
        for file in exported_files(adapter, program)
    }


def _folder_files(folder: str | Path) -> dict[str, Path]:
    """Map names in the repository to the files of an adapter folder that are published.

    Raises:
        ValueError: a file is a link, which could lead anywhere.
    """
    folder = Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*"))}
    for pattern in (f"{SAMPLES_FOLDER}/*", f"{EXPORTS_FOLDER}/*/*"):
        paths |= {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))
        }
    files = {name: path for name, path in paths.items() if _is_published(name)}
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name in (*files, SAMPLES_FOLDER, *folders - {"."}):
        if (folder / name).is_symlink():
            raise ValueError(
                f"'{folder / name}' is a link, which is not published: replace it with the file"
            )
    return files


def _is_published(name: str) -> bool:
    """Whether a file of this name is published."""
    images = rf"({SAMPLES_FOLDER}/)?[^/]+\.png"
    exports = rf"{EXPORTS_FOLDER}/({'|'.join(PROGRAMS)})/[^/]+\.safetensors"
    return name in _NAMES or re.fullmatch(f"{images}|{exports}", name) is not None


_ADAPTER = _Kind(name="an adapter", repo_type="model", mark=INFO_FILE, is_published=_is_published)


def push_space(
    files: Mapping[str, Path], repo_id: str, *, private: bool = False, token: str | None = None
) -> Push:
    """Publish the files of a Space in one commit, as `push_adapter` does those of an adapter.

    Args:
        files: name in the repository -> file, as `write_space` returns them.
        repo_id: `user-or-organisation/name`; created if it does not exist.
        private: whether a new repository is private.
        token: Hub token, as in `push_adapter`.

    Raises:
        KeyboardInterrupt: as in `push_adapter`.
        ValueError: as in `push_adapter`.
    """
    attempt = _Attempt(_SPACE, _api(token), repo_id, _MAIN, dict(files))
    url = attempt.run(private, False, "Space of a fairness adapter")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return Push(repo_id=repo_id, files=sizes, removed=attempt.removed if url else (), url=url)


def check_push(repo_id: str, token: str | None) -> None:
    """Check what a push needs before there is anything to push, without any request.

    Raises:
        ValueError: the repository's id is invalid, or there is no token.
    """
    _check_repo_id(repo_id)
    _api(token)


def _is_of_space(name: str) -> bool:
    return name in SPACE_FILES or name.partition("/")[0] in SPACE_FOLDERS


_SPACE = _Kind(
    name="the Space of an adapter",
    repo_type="space",
    mark=f"{SPACE_FOLDERS[0]}/{INFO_FILE}",
    is_published=_is_of_space,
    creation={"space_sdk": "gradio"},
)


def _check_repo_id(repo_id: str) -> None:
    if repo_id.count("/") != 1:
        raise ValueError(f"expected a repository as 'user-or-organisation/name', got '{repo_id}'")
    validate_repo_id(repo_id)


def _api(token: str | None) -> HfApi:
    """Create a client of the Hub, with the default token if none is given."""
    token = get_token() if token is None else token
    if not token:
        raise ValueError(
            "publishing needs a Hub token with write access: run `hf auth login`, set HF_TOKEN, or "
            "pass a token"
        )
    return HfApi(token=token, library_name="diffusers-fair")


# ---- one attempt ---------------------------------------------------------------------------------


class _Attempt:
    """One push: remembers the state of the Hub, and undoes what it created if it fails."""

    def __init__(self, kind: _Kind, api: HfApi, repo_id: str, branch: str, files: dict[str, Path]):
        self.kind, self.api, self.files = kind, api, files
        self.repo_id, self.branch = repo_id, branch
        self.repo: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type}
        self.main: _Info | None = None  # the main branch before the push
        self.requested: list[str] = []  # not refused: "repository", "branch", "commit"
        self.removed: tuple[str, ...] = ()

    def run(self, private: bool, create_pr: bool, message: str) -> str | None:
        """Push; return the URL of the commit or pull request, or None if nothing has changed."""
        try:
            self.main = self._get(_MAIN)
            remote = self.main if self.branch == _MAIN else self._get(self.branch)
        except Exception as error:
            raise ValueError(self._failure(error, "nothing on the Hub was changed")) from error
        self._check(remote, private, create_pr)
        try:
            remote = remote or self._make(private)
            commit = self._commit(remote, create_pr, message)
        except KeyboardInterrupt as stop:
            url, state = self._settle(create_pr)
            outcome = f"was pushed all the same: {url}" if url else f"was not pushed: {state}"
            stop.args = (f"stopped: '{self.repo_id}' {outcome}",)
            raise
        except Exception as error:
            url, state = self._settle(create_pr)
            if url is None:
                raise ValueError(self._failure(error, state)) from error
            return url
        return commit and (commit.pr_url or commit.commit_url)

    def _get(self, revision: str) -> _Info | None:
        """Get a revision; None if it does not exist or the token may not read it."""
        try:
            info: Any = self.api.repo_info(**self.repo, revision=revision, files_metadata=True)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None
        return info

    def _check(self, remote: _Info | None, private: bool, create_pr: bool) -> None:
        """Refuse to write to a repository that the caller cannot have meant."""
        if self.main is None and create_pr:
            raise ValueError(f"there is no repository '{self.repo_id}' to open a pull request in")
        if remote is None and self.branch.startswith("refs/"):
            raise ValueError(f"'{self.repo_id}' has no '{self.branch}'")
        if self.main is not None and private and not self.main.private:
            raise ValueError(
                f"'{self.repo_id}' already exists and is public: make it private on the Hub, or "
                "push without private"
            )
        names = set(_siblings(remote or self.main))
        if self.kind.mark not in names and (foreign := sorted(names - _HUB_NAMES)):
            raise ValueError(
                f"'{self.repo_id}' holds something other than {self.kind.name} ('{foreign[0]}'): "
                "choose another repository"
            )

    def _make(self, private: bool) -> _Info | None:
        """Create the repository or branch that is missing; return its content."""
        if self.main is None:
            with self._requesting("repository"):
                self.api.create_repo(**self.repo, private=private, **self.kind.creation)
        if self.branch != _MAIN:
            with self._requesting("branch"):
                self.api.create_branch(**self.repo, branch=self.branch)
        return self._get(self.branch)

    def _commit(self, remote: _Info | None, create_pr: bool, message: str) -> CommitInfo | None:
        """Commit on top of a revision; return None if nothing has changed."""
        changes = self._changes(remote)
        if not changes:
            return None
        self.removed = tuple(
            c.path_in_repo for c in changes if isinstance(c, CommitOperationDelete)
        )
        with self._requesting("commit"):
            return self.api.create_commit(
                **self.repo,
                operations=changes,
                commit_message=message,
                revision=self.branch,
                create_pr=create_pr,
                parent_commit=remote.sha if remote else None,
            )

    def _changes(self, remote: _Info | None) -> list[CommitOperationAdd | CommitOperationDelete]:
        """List the operations after which the repository has the files of the folder."""
        theirs = _siblings(remote)
        added = [
            CommitOperationAdd(name, path)
            for name, path in self.files.items()
            if name not in theirs or not _same(path, theirs[name])
        ]
        gone = [x for x in theirs if self.kind.is_published(x) and x not in self.files]
        return [*added, *map(CommitOperationDelete, gone)]

    # ---- when something fails

    @contextmanager
    def _requesting(self, what: str) -> Iterator[None]:
        """Remember a requested change, unless the Hub refuses it."""
        self.requested.append(what)
        try:
            yield
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                self.requested.pop()
            raise

    def _settle(self, create_pr: bool) -> tuple[str | None, str]:
        """Return the URL if only the answer was lost; otherwise undo the push.

        Returns:
            The URL or None, and the state of the Hub in words.
        """
        try:
            if "commit" in self.requested and (url := self._arrived(create_pr)):
                return url, "pushed"
            self._undo()
            return None, "nothing on the Hub was changed"
        except Exception:
            changes = " and ".join(self.requested)
            return None, (
                f"whether the {changes} was created is not known: check the Hub, or push again"
            )

    def _arrived(self, create_pr: bool) -> str | None:
        """Return the URL of the push if it has arrived."""
        branch = self._newest_pull_request() if create_pr else self.branch
        remote = self._get(branch) if branch else None
        if remote is None or self._changes(remote):
            return None
        kind = f"discussions/{branch.rpartition('/')[2]}" if create_pr else f"commit/{remote.sha}"
        return f"{self.api.endpoint}/{self.kind.path}{self.repo_id}/{kind}"

    def _newest_pull_request(self) -> str:
        """Return the revision `refs/pr/N` of the newest pull request; empty if there is none."""
        refs = self.api.list_repo_refs(**self.repo, include_pull_requests=True)
        numbers = [int(pull.ref.rpartition("/")[2]) for pull in refs.pull_requests or ()]
        return f"refs/pr/{max(numbers)}" if numbers else ""

    def _undo(self) -> None:
        """Delete what this push created, unless somebody has added to it since."""
        if "repository" in self.requested:
            remote = self._get(_MAIN)
            if remote is not None and not set(_siblings(remote)) - _HUB_NAMES:
                self.api.delete_repo(**self.repo)
        elif "branch" in self.requested and self.main is not None:
            remote = self._get(self.branch)
            if remote is not None and remote.sha == self.main.sha:
                self.api.delete_branch(**self.repo, branch=self.branch)

    def _failure(self, error: BaseException, state: str) -> str:
        return f"'{self.repo_id}' was not pushed: {_reason(error)}; {state}"


def _siblings(remote: _Info | None) -> dict[str, RepoSibling]:
    """Map the file names of a repository to their metadata."""
    return {file.rfilename: file for file in (remote.siblings if remote else None) or ()}


def _same(path: Path, remote: RepoSibling) -> bool:
    """Whether a file equals the one on the Hub, by its git blob id or, in LFS, its SHA-256."""
    data = path.read_bytes()
    if remote.lfs is not None:
        return hashlib.sha256(data).hexdigest() == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id


# ---- reasons -------------------------------------------------------------------------------------

_REASONS = {  # HTTP status -> what it means for a push
    401: "the Hub does not accept the token: run `hf auth login` again",
    402: "the Hub requires a payment",
    403: "the token may not write there: give one with write access to that user or organisation",
    404: "the repository does not exist, or the token may not read it",
    409: "the repository exists but the token may not read it, or it is being changed",
    412: "somebody else has changed it in the meantime: check it and push again",
    429: "the Hub has received too many requests: push again in a few minutes",
}


def _reason(error: BaseException) -> str:
    """Describe in one sentence why a push failed."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps errors of large files
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return f"the Hub has an internal error (status {status}): push again later"
        return _REASONS.get(status, f"the Hub refuses it (status {status}): {_line(error)}")
    if isinstance(error, errors.HTTPError | ConnectionError):
        return f"the connection to the Hub failed ({type(error).__name__}): push again"
    if isinstance(
        error, json.JSONDecodeError | UnicodeDecodeError | LookupError | TypeError | AttributeError
    ):
        return "the answer of the Hub is invalid or incomplete: push again"
    return _line(error)


def _line(error: BaseException) -> str:
    """Put an error's text on one line."""
    return " ".join(str(error).split())[:300]
