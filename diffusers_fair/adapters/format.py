"""`fair_adapter.json`: its schema, its content as dataclasses, reading and writing.

`SCHEMA` is the only definition of the file: untrusted files are checked against it, and
`fair_adapter.schema.json` is generated from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from diffusers_fair import strict_json
from diffusers_fair.adapters.json_schema import ERROR, Schema, check, parse_json, printable, publish
from diffusers_fair.attributes import Attribute, Region
from diffusers_fair.families import FAMILIES, LORA_PREFIXES
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.version import __version__

_FORMAT_VERSIONS = (1, 2)
"""Version 2 is that of adapters with LoRA layers in components that Stable Diffusion lacks."""
INFO_FILE = "fair_adapter.json"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"
MAX_BYTES = {INFO_FILE: 2**20, WEIGHTS_FILE: 2**31, EMBEDS_FILE: 2**26}
"""File that is read -> its maximum size."""
SCHEMA_FILE = Path(__file__).with_name("fair_adapter.schema.json")

SOFT_TOKENS = "soft_tokens"  # the only component that is not a component of the pipeline

_MAX_RANK = 1024
_MAX_ALPHA = 1_000_000
_MAX_SOFT_TOKENS = 1024
_MAX_LABEL = 300  # characters of a name or a word
_MAX_WORDS = 1000  # of one class


# ---- schema --------------------------------------------------------------------------------------


def _object(
    description: str, properties: Mapping[str, Schema], optional: Sequence[str] = (), **more: Any
) -> Schema:
    """Schema of an object with these keys and no others."""
    return {
        "description": description,
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        "properties": dict(properties),
    } | more


_LABEL: Schema = {"type": "string", "minLength": 1, "maxLength": _MAX_LABEL, "format": "label"}
_SHA256: Schema = {
    "type": "string",
    "pattern": "^[0-9a-f]{64}$",
    ERROR: "the {key} of {owner} must be 64 hexadecimal digits",
}
_SHARES: Schema = {
    "type": "array",
    "items": {
        "type": "number",
        "minimum": 0,
        ERROR: "the target of {owner} must not hold negative shares, got {got}",
    },
    ERROR: "the target of {owner} must be numbers",
}
_WORDS: Schema = {
    "type": "array",
    "minItems": 1,
    "maxItems": _MAX_WORDS,
    "items": _LABEL,
    ERROR: "the words of {key} must be a list of strings, 1 to {maxItems} words, got {got}",
}
_LORA = _object(
    f"LoRA layers, in {WEIGHTS_FILE}; their output is scaled by alpha / rank.",
    {
        "rank": {"type": "integer", "minimum": 1, "maximum": _MAX_RANK},
        "alpha": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": _MAX_ALPHA,
            ERROR: "the {key} of {owner} must be positive and at most {maximum}, got {got}",
        },
    },
)
_SOFT_TOKENS = _object(
    f"A trained prefix of every prompt, in {EMBEDS_FILE}.",
    {
        "count": {
            "type": "integer",
            "minimum": 1,
            "maximum": _MAX_SOFT_TOKENS,
            ERROR: "there can be {minimum} to {maximum} soft tokens, got {got}",
        },
        "token": {
            "description": "The placeholder that stands for all of them in a prompt.",
            "type": "string",
            "pattern": "^<[a-z0-9_-]{1,64}>$",
            ERROR: "the placeholder of soft tokens must consist of lowercase letters, digits, "
            "'_' and '-' in angle brackets, such as '<fair>', got {got}",
        },
    },
)
_ATTRIBUTE = _object(
    "A perceived attribute and its target distribution.",
    {
        "name": _LABEL,
        "classes": {
            "type": "array",
            "minItems": 2,
            "uniqueItems": True,
            "items": _LABEL,
            ERROR: "the classes of {owner} must be strings, two or more, got {got}",
        },
        "target": {"description": "Target share of each class; they sum to 1. Empty: equal shares."}
        | _SHARES,
        "targets": {
            "description": "Prompt -> target shares that replace `target` for this prompt.",
            "type": "object",
            "additionalProperties": _SHARES,
        },
        "region": {
            "description": "Region that the classifier sees. Default: the face.",
            "type": "string",
            "enum": list(get_args(Region)),
            ERROR: "the region of attribute {owner} must be one of {enum}, got {got}",
        },
    },
    optional=("targets", "region"),
    title="an attribute",
)
SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": INFO_FILE,
} | _object(
    "Describes the fairness adapter in its folder.",
    {
        "format_version": {"type": "integer", "minimum": 1, "maximum": _FORMAT_VERSIONS[-1]},
        "base_model": _object(
            "The model that the adapter was trained on.",
            {
                "id": {"description": "A Hub id, a folder, or a shipped base's name."} | _LABEL,
                "revision": {
                    "description": "Commit or branch, if it was pinned.",
                    "type": ["string", "null"],
                    "maxLength": _MAX_LABEL,
                    "format": "label",
                },
                "fingerprint": {"description": "SHA-256 of the shapes of its weights."} | _SHA256,
                "family": {
                    "description": f"Family of its pipeline. Default: {STABLE_DIFFUSION.name}.",
                    "type": "string",
                    "enum": [family.name for family in FAMILIES],
                    ERROR: "the {key} of {owner} must be one of {enum}, got {got}",
                },
            },
            optional=("family",),
        ),
        "components": _object(
            "The parts of the adapter.",
            {**dict.fromkeys(LORA_PREFIXES, _LORA), SOFT_TOKENS: _SOFT_TOKENS},
            optional=(*LORA_PREFIXES, SOFT_TOKENS),
            minProperties=1,
            **{ERROR: "expected components of {names}, got {got}"},
        ),
        "attributes": {
            "description": "The attributes that are balanced.",
            "type": "array",
            "minItems": 1,
            "items": _ATTRIBUTE,
            ERROR: "'{key}' must be a list of one or more attributes, got {got}",
        },
        "words": {
            "description": "Attribute -> class -> words that name it in a prompt.",
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": _WORDS,
                ERROR: "the words of {key} must be listed by class, got {got}",
            },
        },
        "recipe": {"description": "The recipe as run.", "type": "object"},
        "library_versions": {
            "description": "Versions of the libraries that it was trained with.",
            "type": "object",
        },
        "evaluation": {
            "description": "Summary of its report, if it was evaluated.",
            "type": ["object", "null"],
        },
        "training": {
            "description": "Cost of the training: iterations, seconds, machine.",
            "type": ["object", "null"],
        },
        "checksums": _object(
            "SHA-256 of each weights file.",
            dict.fromkeys((WEIGHTS_FILE, EMBEDS_FILE), _SHA256),
            optional=(WEIGHTS_FILE, EMBEDS_FILE),
            type=["object", "null"],
            **{ERROR: "{key} must be those of the weights files {names}, got {got}"},
        ),
    },
    optional=("words", "training", "checksums"),  # older files lack them
)


def generated_schema() -> str:
    """Return the text of `fair_adapter.schema.json`."""
    return strict_json.dumps(publish(SCHEMA), indent=2) + "\n"


# ---- dataclasses ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA layers of one component of the pipeline; their output is scaled by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class SoftTokens:
    """A trained prefix of every prompt.

    Raises:
        ValueError: the count is out of range, or the placeholder is invalid.
    """

    count: int
    """m, number of soft tokens."""
    token: str = "<fair>"
    """The placeholder that stands for all of them in a prompt."""

    def __post_init__(self) -> None:
        check(asdict(self), _SOFT_TOKENS, SOFT_TOKENS)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that diffusers gives the m tokens in the tokenizer."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.count)))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that training depends on."""
    libraries = ("torch", "diffusers", "transformers", "peft")
    return {"diffusers-fair": __version__} | {name: version(name) for name in libraries}


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """Description of an adapter: the content of `fair_adapter.json`."""

    base_model: str
    """Base model that it was trained on: a Hub id, a folder, or the name of a shipped base."""
    base_revision: str | None = None
    """Commit or branch of the base model, if it was pinned."""
    fingerprint: str
    """`base_fingerprint` of the base model."""
    family: str = STABLE_DIFFUSION.name
    """Name of the family of the base model's pipeline."""
    components: Mapping[str, Lora | SoftTokens]
    """Component of the pipeline, one of `LORA_PREFIXES` -> its LoRA layers; and `soft_tokens`."""
    attributes: tuple[Attribute, ...]
    """The balanced attributes, with their target distributions."""
    words: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    """Attribute -> class -> words that name it in a prompt, as `prompts.groups.vocabulary` returns
    them. Empty in older folders."""
    recipe: dict[str, Any]
    """The recipe as run."""
    versions: dict[str, str] = field(default_factory=library_versions)
    """Versions of the libraries that it was trained with."""
    evaluation: dict[str, Any] | None = None
    """Summary of its report, if it was evaluated; set by `card.write_card`."""
    training: dict[str, Any] | None = None
    """Cost of the training: `iterations`, `seconds` and machine, among others."""
    checksums: Mapping[str, str] | None = field(default=None, compare=False)
    """SHA-256 of each weights file; set by `write_adapter`. None in older folders."""

    @property
    def lora(self) -> dict[str, Lora]:
        """The components of the pipeline that have LoRA layers."""
        return {part: c for part, c in self.components.items() if isinstance(c, Lora)}

    @property
    def soft_tokens(self) -> SoftTokens | None:
        """The soft tokens, if it has any."""
        component = self.components.get(SOFT_TOKENS)
        return component if isinstance(component, SoftTokens) else None


# ---- reading and writing -------------------------------------------------------------------------


def dump_info(info: AdapterInfo) -> bytes:
    """Return the content of `fair_adapter.json`.

    Raises:
        ValueError: a number is not finite.
    """
    data = {
        "format_version": 1 if info.lora.keys() <= STABLE_DIFFUSION.targets.keys() else 2,
        "base_model": {
            "id": info.base_model,
            "revision": info.base_revision,
            "fingerprint": info.fingerprint,
            # older folders are all of this family, and do not change
            **({} if info.family == STABLE_DIFFUSION.name else {"family": info.family}),
        },
        "components": {part: asdict(size) for part, size in info.components.items()},
        "attributes": [attribute.json() for attribute in info.attributes],
        **({"words": info.words} if info.words else {}),  # so that older folders do not change
        "recipe": info.recipe,
        "library_versions": info.versions,
        "evaluation": info.evaluation,
        "training": info.training,
        "checksums": info.checksums,
    }
    text = strict_json.dumps(data, indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def load_info(content: bytes, where: str) -> AdapterInfo:
    """Read the content of a `fair_adapter.json` that may come from anybody.

    Args:
        content: content of the file.
        where: name of the file in errors.

    Raises:
        ValueError: it is truncated, of another format version, or not what `SCHEMA` describes.
    """
    data = parse_json(content, where, MAX_BYTES[INFO_FILE])
    version = data.get("format_version", 1) if isinstance(data, dict) else 1
    if version not in _FORMAT_VERSIONS:
        raise ValueError(
            f"'{where}' is of format version {str(version)[:40]}, and this package reads the "
            f"versions {_FORMAT_VERSIONS}: use the diffusers-fair that wrote it, or a newer one"
        )
    try:
        check(data, SCHEMA, "the file")
        return _to_info(data)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"'{where}' does not describe an adapter: {error}") from error


def _to_info(data: Mapping[str, Any]) -> AdapterInfo:
    """Convert data that fits `SCHEMA`."""
    base = data["base_model"]
    attributes = tuple(map(_to_attribute, data["attributes"]))
    return AdapterInfo(
        base_model=base["id"],
        base_revision=base["revision"],
        fingerprint=base["fingerprint"],
        family=base.get("family", STABLE_DIFFUSION.name),
        components={
            part: SoftTokens(**size) if part == SOFT_TOKENS else Lora(**size)
            for part, size in data["components"].items()
        },
        attributes=attributes,
        words=_to_words(data.get("words", {}), attributes),
        recipe=data["recipe"],
        versions={name: str(value) for name, value in data["library_versions"].items()},
        evaluation=data["evaluation"],
        training=data.get("training"),
        checksums=data.get("checksums"),
    )


def _to_attribute(entry: Mapping[str, Any]) -> Attribute:
    return Attribute(
        entry["name"],
        tuple(entry["classes"]),
        tuple(entry["target"]),
        {prompt: tuple(shares) for prompt, shares in entry.get("targets", {}).items()},
        entry.get("region", "face"),
    )


def _to_words(
    words: Mapping[str, Mapping[str, list[str]]], attributes: Sequence[Attribute]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Convert words, and refuse those for other attributes or classes."""
    known = {attribute.name: attribute.classes for attribute in attributes}
    for name, by_class in words.items():
        if name not in known:
            raise ValueError(f"words are for the attributes {[*known]}, got {printable(name)}")
        if set(by_class) - set(known[name]):
            raise ValueError(
                f"words of '{name}' are for its classes {known[name]}, "
                f"got {printable(list(by_class))}"
            )
    return {
        name: {class_name: tuple(listed) for class_name, listed in by_class.items()}
        for name, by_class in words.items()
    }
