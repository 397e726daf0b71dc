"""Where `setup` gets what is missing from: the Hub, a URL, or labelled images to train on.

Asking a source for its `Download` costs a small request or two to the Hub and downloads nothing
but the list of a pipeline's components.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from diffusers_fair import strict_json

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

HUB_DATASET = "hf:"  # prefix of the name of a data set on the Hub
_FORM = f"{HUB_DATASET}ORG/NAME, {HUB_DATASET}ORG/NAME/CONFIG or {HUB_DATASET}ORG/NAME/CONFIG/SPLIT"
_METADATA = (".json", ".txt", ".model")  # configurations, vocabularies and merges
_UNUSED = "safety_checker"  # a component of pipelines that is never loaded
_WEIGHTLESS = ("Scheduler", "Tokenizer", "Processor", "Extractor")  # in names of classes
_CARD = "README.md"  # states the licence
INDEX = "model_index.json"  # lists the components of a pipeline
_ONLINE = "check the connection, then give the same command again"
_AGAIN = "what has arrived is kept, so give the same command again to continue"


@dataclass(frozen=True)
class Download:
    """Files that are still to be downloaded."""

    name: str
    size: int
    """Bytes."""
    licence: str
    """As their publisher states it."""
    fetch: Callable[[], object]
    """Downloads the files, or those that an interrupted download left out.

    Raises ValueError if that is not possible.
    """


class Source(Protocol):
    """Something that can be downloaded."""

    def download(self) -> Download:
        """List what remains to be downloaded.

        Raises:
            ValueError: it does not exist, or cannot be reached.
        """


@dataclass(frozen=True)
class UrlFile:
    """A file of weights at a URL, whose size and licence its provider has looked up."""

    url: str
    path: Path
    """File to write."""
    size: int
    """Bytes, for the estimate before the download."""
    licence: str
    """Licence and terms, to be read before the download."""

    def download(self) -> Download:
        """Describe the download, without a request."""
        size = 0 if self.path.is_file() else self.size
        return Download(self.path.name, size, self.licence, self._fetch)

    def _fetch(self) -> None:
        from torch.hub import download_url_to_file

        if self.path.is_file():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(self.url, str(self.path))  # to a temporary file first
        except OSError as error:
            raise ValueError(
                f"cannot download {self.url} to '{self.path}': {_line(error)}; put the file there "
                "by hand, or try again"
            ) from error


@dataclass(frozen=True)
class HubModel:
    """The files of a model's repository that are needed to load it."""

    repo_id: str
    revision: str | None = None
    parts: tuple[str, ...] = ("",)
    """Subfolders that hold weights."""
    prefix: str = ""
    """Beginning of the names of the files of weights."""

    def download(self) -> Download:
        """List the files that are not in the Hub's cache; see `Source`."""
        from huggingface_hub import HfApi

        with _hub(self.repo_id, self.revision):
            info = HfApi().model_info(self.repo_id, revision=self.revision, files_metadata=True)
        return _download(info, "model", self.repo_id, self.revision, self._files(info))

    def _files(self, info: "ModelInfo") -> list[str]:
        names = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
        files = [str(name) for name in names if _is_metadata(name)]
        for part in self._parts(names):
            weights = _weights(names, part, self.prefix)
            if not weights:
                raise ValueError(
                    f"'{self.repo_id}' on the Hub has no weights{f' of {part}' if part else ''}: "
                    "name another model"
                )
            files += weights
        return files

    def _parts(self, names: Sequence[PurePosixPath]) -> tuple[str, ...]:
        """List the subfolders with weights, given the names of all files."""
        return self.parts


@dataclass(frozen=True)
class HubPipeline(HubModel):
    """The files of a diffusers pipeline's repository that are needed to load it."""

    def _parts(self, names: Sequence[PurePosixPath]) -> tuple[str, ...]:
        """Read the components with weights from the pipeline's list, which is downloaded."""
        if PurePosixPath(INDEX) not in names:
            raise ValueError(
                f"'{self.repo_id}' on the Hub is no pipeline of diffusers, as it has no {INDEX}: "
                "name another repository, or download its single file and name that"
            )
        [path] = _fetch("model", self.repo_id, self.revision, [INDEX])
        return components_with_weights(path)


def components_with_weights(index: Path) -> tuple[str, ...]:
    """List the components of a pipeline that have weights, from its `model_index.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another format.
    """
    root = strict_json.loads(index.read_text("utf-8"))
    if not isinstance(root, dict):
        raise ValueError(f"'{index}' must list the components of a pipeline: download it again")
    classes = {name: value[1] for name, value in root.items() if _is_component(value)}
    return tuple(
        name
        for name, kind in classes.items()
        if kind and name != _UNUSED and not any(word in kind for word in _WEIGHTLESS)
    )


def _is_component(entry: object) -> bool:
    """Whether an entry is the library and the class of a component."""
    return isinstance(entry, list) and len(entry) == 2


@dataclass(frozen=True)
class HubDataset:
    """The parquet files of one split of a data set on the Hub."""

    repo_id: str
    config: str = ""
    """Configuration; empty for the only one."""
    split: str = "train"

    @classmethod
    def parse(cls, name: str) -> "HubDataset":
        """Read `hf:ORG/NAME`, `hf:ORG/NAME/CONFIG` or `hf:ORG/NAME/CONFIG/SPLIT`.

        Raises:
            ValueError: another form.
        """
        words = name.removeprefix(HUB_DATASET).split("/")
        if not name.startswith(HUB_DATASET) or len(words) not in (2, 3, 4) or not all(words):
            raise ValueError(f"expected {_FORM}, got '{name}'")
        return cls("/".join(words[:2]), *words[2:])

    def download(self) -> Download:
        """List the files that are not in the Hub's cache; see `Source`."""
        return _download(self._info, "dataset", self.repo_id, None, self._files)

    def paths(self) -> list[Path]:
        """Download the files, or find them in the Hub's cache.

        Raises:
            ValueError: there are none, or they cannot be downloaded.
        """
        return _fetch("dataset", self.repo_id, None, self._files)

    def images(self) -> int | None:
        """Return the number of images, if the data set's card states it."""
        facts = self._card.get("dataset_info", [])
        for config in facts if isinstance(facts, list) else [facts]:
            if config.get("config_name", "default") == self._configuration:
                for split in config.get("splits", []):
                    if split.get("name") == self.split:
                        return split.get("num_examples")
        return None

    @cached_property
    def _info(self) -> "DatasetInfo":
        from huggingface_hub import HfApi

        with _hub(self.repo_id):
            return HfApi().dataset_info(self.repo_id, files_metadata=True)

    @property
    def _card(self) -> dict[str, Any]:
        return self._info.card_data.to_dict() if self._info.card_data else {}

    @property
    def _files(self) -> list[str]:
        names = [file.rfilename for file in self._info.siblings or ()]
        parquet = [name for name in names if name.endswith(".parquet")]
        patterns = self._patterns
        files = sorted(n for n in parquet if any(fnmatch(n, pattern) for pattern in patterns))
        if not files:
            raise ValueError(
                f"data set '{self.repo_id}' has no parquet files {' or '.join(patterns)}: "
                f"expected {_FORM}"
            )
        return files

    @property
    def _patterns(self) -> list[str]:
        """Patterns of the names of the files."""
        listed = {c["config_name"]: c.get("data_files", []) for c in self._card.get("configs", [])}
        if not listed:
            return [f"{self.config and f'{self.config}/'}*{self.split}*"]
        files = listed[self._configuration]
        if isinstance(files, str):
            return [files]
        of_split = [file.get("path", []) for file in files if file.get("split") == self.split]
        return [path for paths in of_split for path in _as_list(paths)]

    @property
    def _configuration(self) -> str:
        """Name of the configuration; the only one, unless one is named."""
        names = [config["config_name"] for config in self._card.get("configs", [])] or ["default"]
        name = self.config or (names[0] if len(names) == 1 else "default")
        if self._card.get("configs") and name not in names:
            raise ValueError(
                f"data set '{self.repo_id}' has the configurations {', '.join(names)}, got "
                f"'{self.config}': name one of them, as in {HUB_DATASET}{self.repo_id}/{names[0]}"
            )
        return name


@dataclass(frozen=True)
class ClassifierTraining:
    """A classifier that can be trained on labelled images."""

    folder: str
    data: str
    """Images, as `classifier train` takes them."""
    label: str
    """Column of the labels."""

    @property
    def command(self) -> str:
        """Return the command that trains it."""
        return (
            f"diffusers-fair classifier train {self.data} --label {self.label} --out {self.folder}"
        )


# ---- files of a repository -----------------------------------------------------------------------


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _is_metadata(name: PurePosixPath) -> bool:
    """Whether a file is the card, or a configuration or vocabulary of the model or a component."""
    if str(name) == _CARD:
        return True
    return name.suffix in _METADATA and len(name.parts) <= 2 and name.parts[0] != _UNUSED


def _weights(names: Sequence[PurePosixPath], part: str, prefix: str) -> list[str]:
    """List the weights in a folder, as safetensors if there are any, without variants."""
    for suffix in (".safetensors", ".bin"):
        found = [
            str(name)
            for name in names
            if name.parent == PurePosixPath(part)
            and name.suffix == suffix
            and name.name.startswith(prefix)
            and "." not in name.stem  # `model.fp16.safetensors` is a variant
        ]
        if found:
            return found
    return []


def _download(
    info: "ModelInfo | DatasetInfo",
    repo_type: str,
    repo_id: str,
    revision: str | None,
    files: Sequence[str],
) -> Download:
    from huggingface_hub import try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    missing = [
        name
        for name in files
        if not isinstance(
            try_to_load_from_cache(repo_id, name, revision=info.sha, repo_type=repo_type), str
        )
    ]
    return Download(
        repo_id,
        sum(sizes[name] for name in missing),
        _licence(info),
        lambda: _fetch(repo_type, repo_id, revision, files),
    )


def _fetch(repo_type: str, repo_id: str, revision: str | None, files: Sequence[str]) -> list[Path]:
    from huggingface_hub import hf_hub_download

    with _hub(repo_id, revision, _AGAIN):
        return [
            Path(hf_hub_download(repo_id, name, revision=revision, repo_type=repo_type))
            for name in files
        ]


def _licence(info: "ModelInfo | DatasetInfo") -> str:
    stated = info.card_data.to_dict() if info.card_data else {}
    return ", ".join(_as_list(stated.get("license") or "no licence stated"))


@contextmanager
def _hub(repo_id: str, revision: str | None = None, advice: str = _ONLINE) -> Iterator[None]:
    """Turn the errors of the Hub's client into one sentence that ends with advice.

    Raises:
        ValueError: any of them.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"cannot download '{repo_id}': {gated(repo_id)}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        reason = "the Hub has no such repository, or it is private: check the name"
        raise ValueError(f"cannot download '{repo_id}': {reason}") from error
    except errors.RevisionNotFoundError as error:
        reason = f"its repository has no revision '{revision}': check the name"
        raise ValueError(f"cannot download '{repo_id}': {reason}") from error
    except (errors.HTTPError, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot download '{repo_id}' from the Hub: {_line(error)}; {advice}"
        ) from error


def gated(repo_id: str) -> str:
    """Advise on a repository whose files are only for those who accept a licence."""
    return (
        "its publisher asks you to accept its licence: do so at "
        f"https://huggingface.co/{repo_id}, then run `hf auth login`"
    )


def _line(error: BaseException) -> str:
    """Put an error's text on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
