"""Adapter folder -> repository on the Hub: checked first, then all of it in one commit, or nothing.

What the client does not retry is not retried here: a push that failed left the Hub as it was, says
so, and can be given again.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    errors,
    get_token,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from diffusers_fair.adapters.folder import README_FILE, REPORT_FILES, SAMPLES_FOLDER, read_adapter
from diffusers_fair.adapters.format import EMBEDS_FILE, INFO_FILE, WEIGHTS_FILE
from diffusers_fair.publishing.card import write_card

MAIN = "main"
NAMES = (INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE, README_FILE, *REPORT_FILES)
HUB_NAMES = {".gitattributes", "LICENSE", README_FILE}  # what the Hub puts in a new repository


@dataclass(frozen=True, kw_only=True)
class Push:
    """What a push put on the Hub, or would put there."""

    repo_id: str
    files: dict[str, int]
    """Name in the repository -> bytes: all that belongs there."""
    removed: tuple[str, ...] = ()
    """What an earlier push had put there and this adapter does not have."""
    url: str | None = None
    """Of the commit or pull request; None in a dry run, or if all was there already."""


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
) -> Push:
    """Publish an adapter folder: weights, card, samples and report in one commit.

    Pushing the same again makes no commit. If anything fails, what was made on the way (a new
    repository, a new branch) is taken back.

    Args:
        folder: an adapter folder; its card is written if there is none yet. A report's files in
            it go along, what does not belong to an adapter stays.
        repo_id: `user-or-organisation/name`; made if it is not there.
        private: whether a new repository is private.
        revision: branch, made from `main` if it is not there; or `refs/pr/N`, to add to a pull
            request.
        create_pr: open a pull request instead of committing.
        message: of the commit.
        token: left out: `HF_TOKEN`, or that of `hf auth login`. Neither printed nor stored.
        dry_run: only check the folder and say what would go up; asks nothing of the Hub.

    Raises:
        ValueError: one sentence: a folder that is no adapter, no token, a repository that holds
            something else, what the Hub refuses; and what has become of the repository.
    """
    folder = Path(folder)
    info, _ = read_adapter(folder)
    if not (folder / README_FILE).exists():
        write_card(folder)
    files = folder_files(folder)
    _check_repo_id(repo_id)
    if create_pr and revision not in (None, MAIN):
        raise ValueError(f"a pull request goes to {MAIN}: leave out the revision '{revision}'")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if dry_run:
        return Push(repo_id=repo_id, files=sizes)
    message = message or f"Adapter of {', '.join(info.components)} for {info.base_model}"
    attempt = _Attempt(_api(token), repo_id, revision or MAIN, files)
    url = attempt.run(private, create_pr, message)
    return Push(repo_id=repo_id, files=sizes, removed=attempt.removed if url else (), url=url)


def folder_files(folder: str | Path) -> dict[str, Path]:
    """Name in the repository -> file, of all in an adapter folder that is published.

    Raises:
        ValueError: a file is a link, which could lead anywhere.
    """
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*"))}
    found |= {f"{SAMPLES_FOLDER}/{p.name}": p for p in sorted(folder.glob(f"{SAMPLES_FOLDER}/*"))}
    files = {name: path for name, path in found.items() if _is_published(name)}
    for name in (*files, SAMPLES_FOLDER):
        if (folder / name).is_symlink():
            raise ValueError(
                f"'{folder / name}' is a link, and links are not published: put the file itself "
                "there"
            )
    return files


def _is_published(name: str) -> bool:
    """Whether a file of this name belongs to a published adapter."""
    pictures = rf"({SAMPLES_FOLDER}/)?[^/]+\.png"
    return name in NAMES or re.fullmatch(pictures, name) is not None


def _check_repo_id(repo_id: str) -> None:
    if repo_id.count("/") != 1:
        raise ValueError(f"expected a repository as 'user-or-organisation/name', got '{repo_id}'")
    validate_repo_id(repo_id)


def _api(token: str | None) -> HfApi:
    """The Hub's client; it finds the usual token itself."""
    token = token or get_token()
    if token is None:
        raise ValueError(
            "publishing needs a token of the Hub that may write: run `hf auth login`, set "
            "HF_TOKEN, or give one"
        )
    return HfApi(token=token, library_name="diffusers-fair")


# ---- one attempt ---------------------------------------------------------------------------------


class _Attempt:
    """What one push finds on the Hub, what it makes there, and how it takes that back."""

    def __init__(self, api: HfApi, repo_id: str, branch: str, files: dict[str, Path]):
        self.api, self.repo_id, self.branch, self.files = api, repo_id, branch, files
        self.main: ModelInfo | None = None  # what was there before
        self.asked: list[str] = []  # of the Hub, and not refused: "repository", "branch", "commit"
        self.removed: tuple[str, ...] = ()

    def run(self, private: bool, create_pr: bool, message: str) -> str | None:
        """Address of the commit or the pull request, or None if there was nothing to change."""
        try:
            self.main = self.look(MAIN)
            there = self.main if self.branch == MAIN else self.look(self.branch)
        except Exception as error:
            raise ValueError(self._failure(error, "nothing on the Hub was changed")) from error
        self._check(there, private, create_pr)
        try:
            there = there or self._make(private)
            commit = self._commit(there, create_pr, message)
        except KeyboardInterrupt:
            with suppress(Exception):
                self._take_back()
            raise
        except Exception as error:
            return self._settle(error, create_pr)
        return commit and (commit.pr_url or commit.commit_url)

    def look(self, revision: str) -> ModelInfo | None:
        """What is there; None if there is no such repository or revision that may be read."""
        try:
            return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None

    def _check(self, there: ModelInfo | None, private: bool, create_pr: bool) -> None:
        """Refuse to write where it was not meant to."""
        if self.main is None and create_pr:
            raise ValueError(f"there is no repository '{self.repo_id}' to open a pull request in")
        if there is None and self.branch.startswith("refs/"):
            raise ValueError(f"'{self.repo_id}' has no '{self.branch}'")
        if self.main is not None and private and not self.main.private:
            raise ValueError(
                f"'{self.repo_id}' is there and public: make it private on the Hub, or push "
                "without private"
            )
        names = set(_siblings(there or self.main))
        if INFO_FILE not in names and (foreign := sorted(names - HUB_NAMES)):
            raise ValueError(
                f"'{self.repo_id}' holds something else than an adapter ('{foreign[0]}'): choose "
                "another repository"
            )

    def _make(self, private: bool) -> ModelInfo | None:
        """Make what is missing, the repository or the branch; what it then holds."""
        if self.main is None:
            with self._asking("repository"):
                self.api.create_repo(self.repo_id, private=private)
        if self.branch != MAIN:
            with self._asking("branch"):
                self.api.create_branch(self.repo_id, branch=self.branch)
        return self.look(self.branch)

    def _commit(self, there: ModelInfo | None, create_pr: bool, message: str) -> CommitInfo | None:
        """One commit on top of what was looked at; none if that is the same."""
        changes = self._changes(there)
        if not changes:
            return None
        self.removed = tuple(
            c.path_in_repo for c in changes if isinstance(c, CommitOperationDelete)
        )
        with self._asking("commit"):
            return self.api.create_commit(
                self.repo_id,
                changes,
                commit_message=message,
                revision=self.branch,
                create_pr=create_pr,
                parent_commit=there.sha if there else None,
            )

    def _changes(self, there: ModelInfo | None) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What makes the published files there those of the folder."""
        theirs = _siblings(there)
        added = [
            CommitOperationAdd(name, path)
            for name, path in self.files.items()
            if name not in theirs or not _same(path, theirs[name])
        ]
        gone = [name for name in theirs if _is_published(name) and name not in self.files]
        return [*added, *map(CommitOperationDelete, gone)]

    # ---- when something fails

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Note what the Hub is asked to change, unless it answers that it does not."""
        self.asked.append(what)
        try:
            yield
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                self.asked.pop()
            raise

    def _settle(self, error: Exception, create_pr: bool) -> str:
        """The address after all, if only the answer was lost; else as it was, and the error."""
        try:
            if "commit" in self.asked and (url := self._arrived(create_pr)):
                return url
            self._take_back()
            state = "nothing on the Hub was changed"
        except Exception:
            asked = " and ".join(self.asked)
            state = f"the {asked} that was asked for may be there: look at it, or push again"
        raise ValueError(self._failure(error, state)) from error

    def _arrived(self, create_pr: bool) -> str | None:
        """Address of what was pushed, if it is there."""
        branch = self._newest_pull_request() if create_pr else self.branch
        there = self.look(branch) if branch else None
        if there is None or self._changes(there):
            return None
        kind = f"discussions/{branch.rpartition('/')[2]}" if create_pr else f"commit/{there.sha}"
        return f"{self.api.endpoint}/{self.repo_id}/{kind}"

    def _newest_pull_request(self) -> str:
        """Its revision, `refs/pr/N`; empty if there is none."""
        found = self.api.list_repo_refs(self.repo_id, include_pull_requests=True).pull_requests
        numbers = [int(pull_request.ref.rpartition("/")[2]) for pull_request in found or ()]
        return f"refs/pr/{max(numbers)}" if numbers else ""

    def _take_back(self) -> None:
        """Undo what was made, if nobody has put anything there since."""
        if "repository" in self.asked:
            there = self.look(MAIN)
            if there is not None and not set(_siblings(there)) - HUB_NAMES:
                self.api.delete_repo(self.repo_id)
        elif "branch" in self.asked and self.main is not None:
            there = self.look(self.branch)
            if there is not None and there.sha == self.main.sha:
                self.api.delete_branch(self.repo_id, branch=self.branch)

    def _failure(self, error: BaseException, state: str) -> str:
        return f"'{self.repo_id}' was not pushed: {_reason(error)}; {state}"


def _siblings(there: ModelInfo | None) -> dict[str, RepoSibling]:
    """Name -> file, of what a repository holds."""
    return {file.rfilename: file for file in (there.siblings if there else None) or ()}


def _same(path: Path, remote: RepoSibling) -> bool:
    """Whether a file is, bit for bit, the one on the Hub: as git or as its large files count it."""
    data = path.read_bytes()
    if remote.lfs is not None:
        return hashlib.sha256(data).hexdigest() == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id


# ---- why not -------------------------------------------------------------------------------------

REASONS = {  # HTTP status -> what it means to who pushes
    401: "the Hub does not accept the token: run `hf auth login` again",
    402: "the Hub asks for a payment",
    403: "the token may not write there: give one with write access to that user or organisation",
    404: "there is no such repository that the token may read",
    409: "a repository of that name is there, which the token may not read, or it is being changed",
    412: "somebody else changed it meanwhile: look at it and push again",
    429: "the Hub has had too many requests: push again in some minutes",
}


def _reason(error: BaseException) -> str:
    """Why it failed, in a sentence."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps what happens to a large file
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return f"the Hub has trouble of its own (status {status}): push again later"
        return REASONS.get(status, f"the Hub refuses it (status {status}): {_line(error)}")
    if isinstance(error, errors.HTTPError | ConnectionError):
        return f"the Hub cannot be reached or broke off ({type(error).__name__}): push again"
    if isinstance(
        error, json.JSONDecodeError | UnicodeDecodeError | LookupError | TypeError | AttributeError
    ):
        return "what answered does not speak as the Hub does, or was cut off: push again"
    return _line(error)


def _line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())[:300]
