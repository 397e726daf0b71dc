"""The adapter folder: written and read here only, and checked before anything in it is believed.

- `pytorch_lora_weights.safetensors`: low-rank weights; plain `pipe.load_lora_weights(folder)` works
- `learned_embeds.safetensors`: soft tokens; plain `pipe.load_textual_inversion(folder, weight_name=
  "learned_embeds.safetensors")` works, with the placeholder typed before the prompt
- `fair_adapter.json`: what they are, and which words name the classes, `AdapterInfo`; its schema is
  `fair_adapter.schema.json`
- `README.md`, `samples/*.png`, a report's files: for people; never read from here
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.families import LORA_PREFIXES as PREFIXES
from diffusers_fair.version import __version__

FORMAT_VERSION = 1
INFO_FILE = "fair_adapter.json"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"
README_FILE = "README.md"
SAMPLES_FOLDER = "samples"
REPORT_FILES = ("report.json", "report.html", "records.jsonl")
SCHEMA = Path(__file__).with_name("fair_adapter.schema.json")

SOFT_TOKENS = "soft_tokens"  # the component that is no part of the pipeline
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha in the header

DTYPES = ("F32", "F16", "BF16")
MAX_RANK = 1024
MAX_SOFT_TOKENS = 1024
MAX_BYTES = {INFO_FILE: 2**20, WEIGHTS_FILE: 2**31, EMBEDS_FILE: 2**26}
"""The files that are read, and how large they may be."""
MAX_LABEL = 300  # characters of a name or a word
MAX_WORDS = 1000  # of one class
MAX_DEPTH = 20  # of nested objects and lists in JSON
OPTIONAL: dict[str, Any] = {"words": {}, "training": None, "checksums": None}
"""Keys of `fair_adapter.json` that older folders lack, and what they stand for there."""

Weights = dict[str, Tensor]
"""All tensors of an adapter: `COMPONENT.module.lora_A.weight` (rank, in), `.lora_B.` (out, rank),
..., and the placeholder of the soft tokens (m, d)."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Size of the low-rank layers of one part; their output is scaled by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class SoftTokens:
    """A trained prefix of every prompt.

    Raises:
        ValueError: a count or a placeholder that cannot be.
    """

    count: int
    """m, number of soft tokens."""
    token: str = "<fair>"
    """The placeholder that stands for them all in a prompt."""

    def __post_init__(self) -> None:
        """Refuse what no tokenizer could tell from other words."""
        if not 1 <= self.count <= MAX_SOFT_TOKENS:
            raise ValueError(f"there can be 1 to {MAX_SOFT_TOKENS} soft tokens, got {self.count}")
        if not re.fullmatch(r"<[a-z0-9_-]{1,64}>", self.token):
            raise ValueError(
                "the placeholder of soft tokens must be of small letters, digits, '_' and '-' in "
                f"angle brackets, as '<fair>', got {self.token[:100]!r}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What diffusers calls the m tokens in the tokenizer."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.count)))


def library_versions() -> dict[str, str]:
    """Versions of what can change an adapter's numbers."""
    libraries = ("torch", "diffusers", "transformers", "peft")
    own = {"diffusers-fair": __version__}
    return own | {name: version(name) for name in libraries}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter is: the content of `fair_adapter.json`."""

    base_model: str
    """The base it was trained on: `testbed`, a Hub id or a folder."""
    base_revision: str | None = None
    """Commit or branch of the base, if it was pinned."""
    fingerprint: str
    """`base_fingerprint` of the base."""
    components: Mapping[str, Lora | SoftTokens]
    """Parts of the pipeline, of `PREFIXES`, and their low-rank layers; `soft_tokens`."""
    attributes: tuple[Attribute, ...]
    """What was balanced, and the distribution aimed at."""
    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Attribute -> class -> words that name it in a prompt, as `prompts.groups.vocabulary` gives
    them. Empty in folders from before words were noted."""
    recipe: dict[str, Any]
    """The recipe as run."""
    versions: dict[str, str] = field(default_factory=library_versions)
    """Libraries it was trained with."""
    evaluation: dict[str, Any] | None = None
    """Summary of its report, if it was evaluated; `card.write_card` puts it there."""
    training: dict[str, Any] | None = None
    """What the training took: `iterations`, `seconds` and what else is to be told of it."""
    checksums: Mapping[str, str] | None = field(default=None, compare=False)
    """SHA-256 of each file of weights; `write_adapter` puts them there."""

    @property
    def lora(self) -> dict[str, Lora]:
        """The parts that carry low-rank layers."""
        return {part: c for part, c in self.components.items() if isinstance(c, Lora)}

    @property
    def soft_tokens(self) -> SoftTokens | None:
        """The prompt prefix, if it has one."""
        found = self.components.get(SOFT_TOKENS)
        return found if isinstance(found, SoftTokens) else None


def write_adapter(folder: str | Path, weights: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter folder, all of it or nothing.

    Args:
        folder: new, empty, or an adapter folder, which is replaced.
        weights: in diffusers' layout, as `TrainableAdapter.weights` gives them.
        info: what the adapter is.

    Raises:
        ValueError: the folder holds something else, or `read_adapter` would refuse the result.
    """
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        _save_tensors(temporary, tensors, info)
        (temporary / INFO_FILE).write_bytes(_to_text(_with_checksums(info, temporary)))
        read_adapter(temporary)  # what could not be read back never gets its name
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_info(folder: str | Path, info: AdapterInfo) -> None:
    """Say otherwise what an adapter is; its weights stay.

    Args:
        folder: an adapter folder.
        info: of the same components.

    Raises:
        ValueError: it is no adapter folder, or `read_adapter` would refuse the result.
    """
    old, _ = read_adapter(folder)
    if info.components != old.components:
        raise ValueError(
            f"'{folder}' holds the weights of {old.components}, not of {info.components}: write "
            "them with write_adapter"
        )
    text, path = _to_text(_with_checksums(info, Path(folder))), Path(folder) / INFO_FILE
    _from_json(_parse_json(text, str(path)), str(path))
    replace_file(path, text)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; what a link of that name leads to stays as it is."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(folder: str | Path) -> tuple[AdapterInfo, Weights]:
    """Read an adapter folder that may come from anybody.

    Returns:
        What the adapter is, and all its weights in diffusers' layout.

    Raises:
        ValueError: one sentence on what is missing, damaged, of another version or not acceptable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no adapter folder at '{folder}'")
    info_path = _checked_file(folder / INFO_FILE)
    info = _from_json(_parse_json(info_path.read_bytes(), str(info_path)), str(info_path))
    named = {WEIGHTS_FILE: bool(info.lora), EMBEDS_FILE: info.soft_tokens is not None}
    for name in named:
        if not named[name] and (folder / name).exists():
            raise ValueError(f"'{folder}' has a '{name}', and its {INFO_FILE} names nothing in it")
    weights: Weights = {}
    if info.lora:
        path = _checked_file(folder / WEIGHTS_FILE)
        weights |= _read_tensors(path, info, _check_lora)
    if info.soft_tokens:
        path = _checked_file(folder / EMBEDS_FILE)
        weights |= _read_tensors(path, info, _check_soft_tokens)
    for name, checksum in (info.checksums or {}).items():
        if checksum != _checksum(_checked_file(folder / name)):
            raise ValueError(f"'{folder / name}' is damaged: it is not what {INFO_FILE} names")
    return info, weights


# ---- folders and files ---------------------------------------------------------------------------


def _refuse_foreign(folder: Path) -> None:
    """Only a new or empty folder, or an adapter folder with nothing else in it, may be written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: choose a folder for the adapter")
    names = {path.name for path in folder.iterdir()}
    own = {INFO_FILE, WEIGHTS_FILE, EMBEDS_FILE, README_FILE, SAMPLES_FOLDER, *REPORT_FILES}
    foreign = sorted(names - own)
    if foreign or (names and INFO_FILE not in names):
        raise ValueError(
            f"'{folder}' holds something else than an adapter ('{(foreign or sorted(names))[0]}'): "
            "choose another folder or empty it"
        )


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the finished folder its name; what had it before goes away afterwards."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name(temporary.name + "-old")
    folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old)


def _checked_file(path: Path) -> Path:
    """The path of a regular file that lies in the folder itself and is not too large."""
    if not path.is_file():
        raise ValueError(f"'{path.parent}' is not an adapter folder: '{path.name}' is missing")
    if not any(path.resolve().is_relative_to(home) for home in _homes(path.parent.resolve())):
        raise ValueError(f"'{path}' is a link to somewhere else: put the file itself there")
    check_size(str(path), path.name, path.stat().st_size)
    return path


def check_size(where: str, name: str, size: int) -> None:
    """Refuse one of the folder's files that is larger than it may be.

    Raises:
        ValueError: more bytes than `MAX_BYTES` has for its name.
    """
    if size > MAX_BYTES[name]:
        raise ValueError(f"'{where}' has {size} bytes, more than the {MAX_BYTES[name]} allowed")


def _with_checksums(info: AdapterInfo, folder: Path) -> AdapterInfo:
    """The same, of the files of weights that are there."""
    files = [folder / name for name in (WEIGHTS_FILE, EMBEDS_FILE)]
    return replace(info, checksums={path.name: _checksum(path) for path in files if path.exists()})


def _checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _homes(folder: Path) -> Iterator[Path]:
    """Where the files of a folder may lie: a snapshot in the Hub's cache is links to blobs."""
    yield folder
    if folder.parent.name == "snapshots":
        yield folder.parent.parent / "blobs"


# ---- fair_adapter.json ---------------------------------------------------------------------------


def _parse_json(text: str | bytes, where: str) -> Any:
    """JSON of bounded size and depth, of finite numbers."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number[:40]} is not a finite number")
        return value

    try:
        if len(text) > MAX_BYTES[INFO_FILE]:
            raise ValueError(f"it is longer than {MAX_BYTES[INFO_FILE]}")
        text = text.decode() if isinstance(text, bytes) else text
        # strings out, also one without an end: to look for its end again and again takes hours
        bare = re.sub(r'"(?:[^"\\]|\\.?)*(?:"|\Z)', "", text, flags=re.DOTALL)
        depths = accumulate((mark in "[{") - (mark in "]}") for mark in bare)
        if max(depths, default=0) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except ValueError as error:
        raise ValueError(f"'{where}' is truncated or not acceptable JSON: {error}") from error


def _to_text(info: AdapterInfo) -> bytes:
    text = json.dumps(_to_json(info), indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _to_json(info: AdapterInfo) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "base_model": {
            "id": info.base_model,
            "revision": info.base_revision,
            "fingerprint": info.fingerprint,
        },
        "components": {part: asdict(size) for part, size in info.components.items()},
        "attributes": [attribute.json() for attribute in info.attributes],
        **({"words": info.words} if info.words else {}),  # older folders stay as they are
        "recipe": info.recipe,
        "library_versions": info.versions,
        "evaluation": info.evaluation,
        "training": info.training,
        "checksums": info.checksums,
    }


def _from_json(data: Any, where: str) -> AdapterInfo:
    """The inverse of `_to_json`, of data that may be anything."""
    if isinstance(data, dict) and data.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(
            f"'{where}' is of format version {str(data['format_version'])[:40]}, and this package "
            f"reads version {FORMAT_VERSION}: use the diffusers-fair that wrote it, or a newer one"
        )
    try:
        root = _object(
            OPTIONAL | data if isinstance(data, dict) else data,
            "the file",
            {
                "format_version": int,
                "base_model": dict,
                "components": dict,
                "attributes": list,
                "words": dict,
                "recipe": dict,
                "library_versions": dict,
                "evaluation": (dict, type(None)),
                "training": (dict, type(None)),
                "checksums": (dict, type(None)),
            },
        )
        base = _object(
            root["base_model"],
            "base_model",
            {"id": str, "revision": (str, type(None)), "fingerprint": str},
        )
        if not re.fullmatch("[0-9a-f]{64}", base["fingerprint"]):
            raise ValueError("the fingerprint of base_model must be 64 hexadecimal digits")
        attributes = _attributes(root["attributes"])
        return AdapterInfo(
            base_model=_label(base["id"]),
            base_revision=base["revision"] and _label(base["revision"]),
            fingerprint=base["fingerprint"],
            components=_components(root["components"]),
            attributes=attributes,
            words=_words(root["words"], attributes),
            recipe=root["recipe"],
            versions={name: str(number) for name, number in root["library_versions"].items()},
            evaluation=root["evaluation"],
            training=root["training"],
            checksums=_checksums(root["checksums"]),
        )
    except (ValueError, OverflowError) as error:
        raise ValueError(f"'{where}' does not describe an adapter: {error}") from error


def _object(value: Any, name: str, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A JSON object that has exactly these keys, each of its kind (a bool is no number)."""
    if not isinstance(value, dict) or set(value) != set(kinds):
        got = str(sorted(value) if isinstance(value, dict) else type(value).__name__)[:200]
        raise ValueError(f"expected {name} to have the keys {sorted(kinds)}, got {got}")
    for key, kind in kinds.items():
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"'{key}' of {name} must not be {type(value[key]).__name__}")
    return value


def _components(value: dict[str, Any]) -> dict[str, Lora | SoftTokens]:
    known = [*PREFIXES, SOFT_TOKENS]
    if not value or set(value) - set(known):
        raise ValueError(f"expected components of {known}, got {str(list(value))[:200]}")
    return {
        part: _soft_tokens(size) if part == SOFT_TOKENS else _lora(part, size)
        for part, size in value.items()
    }


def _soft_tokens(value: Any) -> SoftTokens:
    return SoftTokens(**_object(value, SOFT_TOKENS, {"count": int, "token": str}))


def _lora(part: str, value: Any) -> Lora:
    size = _object(value, part, {"rank": int, "alpha": (int, float)})
    if not 1 <= size["rank"] <= MAX_RANK:
        raise ValueError(f"the rank of {part} must be from 1 to {MAX_RANK}, got {size['rank']}")
    if not (0 < size["alpha"] <= 1e6 and math.isfinite(size["alpha"])):
        raise ValueError(f"the alpha of {part} must be positive, got {size['alpha']}")
    return Lora(rank=size["rank"], alpha=size["alpha"])


def _checksums(value: dict[str, Any] | None) -> dict[str, str] | None:
    for name, digits in (value or {}).items():
        if name not in (WEIGHTS_FILE, EMBEDS_FILE):
            raise ValueError(f"checksums are of the files of weights, got {name[:100]!r}")
        if not (isinstance(digits, str) and re.fullmatch("[0-9a-f]{64}", digits)):
            raise ValueError(f"the checksum of '{name}' must be 64 hexadecimal digits")
    return value


def _attributes(value: list[Any]) -> tuple[Attribute, ...]:
    if not value:
        raise ValueError("it must name one or more attributes")
    return tuple(map(_attribute, value))


def _attribute(value: Any) -> Attribute:
    kinds = {"name": str, "classes": list, "target": list, "targets": dict, "region": str}
    filled = {"targets": {}, "region": "face"} | value if isinstance(value, dict) else value
    entry = _object(filled, "an attribute", kinds)
    name, own = _label(entry["name"]), entry["targets"]
    if not all(isinstance(each, str) for each in entry["classes"]):
        raise ValueError(f"the classes of '{name}' must be strings")
    return Attribute(
        name,
        tuple(map(_label, entry["classes"])),
        _shares(entry["target"], name),
        {prompt: _shares(shares, name) for prompt, shares in own.items()},
        entry["region"],
    )


def _shares(value: Any, name: str) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in value
    )
    if not numbers:
        raise ValueError(f"the target of '{name}' must be numbers")
    return tuple(value)


def _words(
    value: dict[str, Any], attributes: Sequence[Attribute]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Words for classes of these attributes alone."""
    known = {attribute.name: attribute.classes for attribute in attributes}
    for name, by_class in value.items():
        if name not in known:
            raise ValueError(f"words are for the attributes {[*known]}, got {name[:100]!r}")
        if not isinstance(by_class, dict) or set(by_class) - set(known[name]):
            got = str(list(by_class) if isinstance(by_class, dict) else by_class)[:100]
            raise ValueError(f"words of '{name}' are for its classes {known[name]}, got {got}")
    return {
        name: {each: _words_of(each, words) for each, words in by_class.items()}
        for name, by_class in value.items()
    }


def _words_of(name: str, words: Any) -> tuple[str, ...]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"the words of '{name}' must be a list of strings")
    if not 1 <= len(words) <= MAX_WORDS:
        raise ValueError(f"'{name}' must have 1 to {MAX_WORDS} words, got {len(words)}")
    return tuple(map(_label, words))


def _label(text: str) -> str:
    """What is shown to people: one short line without control characters."""
    if not (text.strip() and len(text) <= MAX_LABEL and text.isprintable()):
        raise ValueError(
            f"names and words must be 1 to {MAX_LABEL} printable characters, "
            f"got {ascii(text)[:100]}"
        )
    return text


# ---- the two files of weights --------------------------------------------------------------------

Slices = dict[str, Any]  # key -> a tensor of a file of which only the header has been read


def _save_tensors(folder: Path, tensors: Weights, info: AdapterInfo) -> None:
    """Write each tensor into its file; what is in the wrong one is found when it is read back.

    As bytes, because safetensors' own files are closed to all but their owner.
    """
    embeds = {key: tensor for key, tensor in tensors.items() if key.startswith("<")}
    lora = {key: tensor for key, tensor in tensors.items() if key not in embeds}
    if lora or info.lora:
        metadata = json.dumps(_lora_metadata(lora, info), indent=2)
        data = save(lora, metadata={"format": "pt", METADATA_KEY: metadata})
        (folder / WEIGHTS_FILE).write_bytes(_ordered(data))
    if embeds or info.soft_tokens:
        (folder / EMBEDS_FILE).write_bytes(save(embeds, metadata={"format": "pt"}))


def _ordered(data: bytes) -> bytes:
    """The same safetensors, its metadata in order: they come in any, from run to run."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def _read_tensors(
    path: Path, info: AdapterInfo, check: Callable[[Slices, dict[str, str], AdapterInfo], None]
) -> Weights:
    """The tensors of a file, after `check` has seen its header: names, shapes, metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            check(slices, file.metadata() or {}, info)
            _check_dtypes({key: part.get_dtype() for key, part in slices.items()})
            tensors = {key: file.get_tensor(key) for key in slices}
        _check_finite(tensors)
        return tensors
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is truncated or damaged, copy or download it again: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"'{path}' does not hold the weights of an adapter: {error}") from error


def _check_lora(slices: Slices, metadata: dict[str, str], info: AdapterInfo) -> None:
    _check_shapes({key: tuple(part.get_shape()) for key, part in slices.items()}, info.lora)
    written = _parse_json(metadata.get(METADATA_KEY, "{}"), METADATA_KEY)
    if written != _lora_metadata(slices, info):
        raise ValueError(f"'{METADATA_KEY}' does not agree with {INFO_FILE}")


def _check_soft_tokens(slices: Slices, metadata: dict[str, str], info: AdapterInfo) -> None:
    """One key, the placeholder, of shape (m, d)."""
    assert info.soft_tokens is not None
    count, token = info.soft_tokens.count, info.soft_tokens.token
    if list(slices) != [token]:
        raise ValueError(f"expected '{token}' alone in it, got {str(list(slices))[:200]}")
    shape = slices[token].get_shape()
    if len(shape) != 2 or shape[0] != count or shape[1] < 1:
        raise ValueError(f"expected {count} rows of '{token}', got the shape {list(shape)}")


def _lora_metadata(keys: Mapping[str, Any], info: AdapterInfo) -> dict[str, Any]:
    """What diffusers makes its `LoraConfig` from; without it, it takes alpha = rank."""
    metadata: dict[str, Any] = {}
    for part, lora in info.lora.items():
        modules = {
            key.removeprefix(PREFIXES[part]).rpartition(".lora_")[0]
            for key in keys
            if key.startswith(PREFIXES[part])
        }
        metadata[f"{part}.r"] = lora.rank
        metadata[f"{part}.lora_alpha"] = lora.alpha
        metadata[f"{part}.target_modules"] = sorted(modules)
    return metadata


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], components: Mapping[str, Lora]) -> None:
    """Every key is `prefix.module.lora_A.weight` (rank, in) or `.lora_B.` (out, rank), in pairs."""
    ranks = {PREFIXES[part]: lora.rank for part, lora in components.items()}
    names = rf"({'|'.join(map(re.escape, ranks))})(\w+(?:\.\w+)*)\.lora_([AB])\.weight"
    for key, shape in shapes.items():
        match = re.fullmatch(names, key, re.ASCII)
        if match is None:
            raise ValueError(f"{key[:200]!r} is no low-rank weight of {list(components)}")
        prefix, module, half = match.groups()
        axis, other = (0, "B") if half == "A" else (1, "A")
        if len(shape) != 2 or min(shape) < 1 or shape[axis] != ranks[prefix]:
            raise ValueError(f"'{key}' is of rank {ranks[prefix]} but has the shape {list(shape)}")
        if f"{prefix}{module}.lora_{other}.weight" not in shapes:
            raise ValueError(f"'{key}' stands without its lora_{other}")
    for part in components:
        if not any(key.startswith(PREFIXES[part]) for key in shapes):
            raise ValueError(f"nothing in it is for '{part}'")


def _check_dtypes(dtypes: Mapping[str, str]) -> None:
    for key, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ValueError(f"'{key}' is of type {dtype}, expected one of {list(DTYPES)}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"'{key}' holds NaN or infinite values")
