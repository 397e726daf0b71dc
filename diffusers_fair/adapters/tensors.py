"""Writes the two weights files reproducibly, and checks them before they are loaded."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusers_fair import strict_json
from diffusers_fair.adapters.format import (
    EMBEDS_FILE,
    INFO_FILE,
    MAX_BYTES,
    WEIGHTS_FILE,
    AdapterInfo,
    Lora,
)
from diffusers_fair.adapters.json_schema import parse_json
from diffusers_fair.families import EMBEDDING_KEYS, LORA_PREFIXES

Weights = dict[str, Tensor]
"""All weights of an adapter: `COMPONENT.module.lora_A.weight` (rank, in), `.lora_B.` (out, rank),
..., and the soft tokens (m, d): their placeholder, or one of `EMBEDDING_KEYS` per text encoder."""

_METADATA_KEY = "lora_adapter_metadata"  # header key in which diffusers looks for rank and alpha
_PATTERNS = ("rank_pattern", "alpha_pattern")
"""Metadata that diffusers 0.34 to 0.39 requires; adapters of earlier versions lack it."""
_DTYPES = ("F32", "F16", "BF16")
_Slices = dict[str, Any]  # key -> tensor in a file, of which only the header has been read
_Check = Callable[[_Slices, dict[str, str], AdapterInfo], None]


def write_tensors(folder: Path, weights: Mapping[str, Tensor], info: AdapterInfo) -> None:
    """Write each tensor to its file. Invalid tensors are refused when the folder is read back."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    embeds = {key: tensor for key, tensor in tensors.items() if _is_embedding(key)}
    lora = {key: tensor for key, tensor in tensors.items() if key not in embeds}
    # `save_file` of safetensors would create files that only their owner may read.
    if lora or info.lora:
        metadata = strict_json.dumps(_lora_metadata(lora, info), indent=2)
        content = serialize(lora, {"format": "pt", _METADATA_KEY: metadata})
        (folder / WEIGHTS_FILE).write_bytes(content)
    if embeds or info.soft_tokens:
        (folder / EMBEDS_FILE).write_bytes(save(embeds, metadata={"format": "pt"}))


def read_lora(path: Path, info: AdapterInfo) -> Weights:
    """Read the LoRA weights.

    Raises:
        ValueError: the file is damaged, or does not contain the weights that `info` describes.
    """
    return _read(path, info, _check_lora)


def read_soft_tokens(path: Path, info: AdapterInfo) -> Weights:
    """Read the embeddings of the soft tokens.

    Raises:
        ValueError: the file is damaged, or does not contain the embeddings that `info` describes.
    """
    return _read(path, info, _check_soft_tokens)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file; the same tensors and metadata are the same bytes.

    safetensors writes metadata in an order that varies between runs; here it is sorted.
    """
    data = save(dict(tensors), metadata=dict(metadata))
    start = data_start(data)
    header = strict_json.loads(data[8:start])
    return _header_bytes(header) + data[start:]


def data_start(data: bytes) -> int:
    """Return the offset of the tensors in a safetensors file, of which the start is given."""
    return 8 + int.from_bytes(data[:8], "little")


def header_for_digest(file: BinaryIO) -> bytes:
    """Read the header of a checked safetensors file as it enters the adapter's digest.

    The digest does not depend on `_PATTERNS`: an adapter keeps it when they are added to its file.
    """
    size = file.read(8)
    data = size + file.read(data_start(size) - 8)
    header = strict_json.loads(data[8:])
    text = header.get("__metadata__", {}).get(_METADATA_KEY, "{}")
    described = strict_json.loads(text)
    kept = _without_patterns(described)
    if kept == described:
        return data
    header["__metadata__"][_METADATA_KEY] = strict_json.dumps(kept, indent=2)
    return _header_bytes(header)


def _header_bytes(header: dict[str, Any]) -> bytes:
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = strict_json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _without_patterns(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the patterns that are empty, which say no more than none."""
    return {
        key: value
        for key, value in metadata.items()
        if value != {} or key.rpartition(".")[2] not in _PATTERNS
    }


def _read(path: Path, info: AdapterInfo, check: _Check) -> Weights:
    """Read the tensors of a file after checking the names, shapes and metadata in its header."""
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


def _check_lora(slices: _Slices, metadata: dict[str, str], info: AdapterInfo) -> None:
    _check_shapes({key: tuple(part.get_shape()) for key, part in slices.items()}, info.lora)
    text = metadata.get(_METADATA_KEY, "{}")
    described = parse_json(text, _METADATA_KEY, MAX_BYTES[INFO_FILE])
    expected = _without_patterns(_lora_metadata(slices, info))
    if not isinstance(described, dict) or _without_patterns(described) != expected:
        raise ValueError(f"'{_METADATA_KEY}' does not agree with {INFO_FILE}")


def _check_soft_tokens(slices: _Slices, metadata: dict[str, str], info: AdapterInfo) -> None:
    """Check for the placeholder or the keys of several text encoders; tensors of shape (m, d)."""
    assert info.soft_tokens is not None
    count, token = info.soft_tokens.count, info.soft_tokens.token
    if sorted(slices) not in ([token], *map(sorted, EMBEDDING_KEYS)):
        raise ValueError(
            f"expected only '{token}' in it, or {EMBEDDING_KEYS}, got {str(list(slices))[:200]}"
        )
    for key, part in slices.items():
        shape = part.get_shape()
        if len(shape) != 2 or shape[0] != count or shape[1] < 1:
            raise ValueError(f"expected {count} rows of '{key}', got the shape {list(shape)}")


def _is_embedding(key: str) -> bool:
    return key.startswith("<") or any(key in keys for keys in EMBEDDING_KEYS)


def _lora_metadata(keys: Iterable[str], info: AdapterInfo) -> dict[str, Any]:
    """Metadata for diffusers' `LoraConfig`; without it, diffusers assumes alpha = rank."""
    metadata: dict[str, Any] = {}
    for part, lora in info.lora.items():
        modules = {
            key.removeprefix(LORA_PREFIXES[part]).rpartition(".lora_")[0]
            for key in keys
            if key.startswith(LORA_PREFIXES[part])
        }
        metadata[f"{part}.r"] = lora.rank
        metadata[f"{part}.lora_alpha"] = lora.alpha
        metadata[f"{part}.target_modules"] = sorted(modules)
        metadata |= {f"{part}.{name}": {} for name in _PATTERNS}
    return metadata


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], components: Mapping[str, Lora]) -> None:
    """Check for pairs of `prefix.module.lora_A.weight` (rank, in) and `.lora_B.` (out, rank)."""
    ranks = {LORA_PREFIXES[part]: lora.rank for part, lora in components.items()}
    names = rf"({'|'.join(map(re.escape, ranks))})(\w+(?:\.\w+)*)\.lora_([AB])\.weight"
    for key, shape in shapes.items():
        match = re.fullmatch(names, key, re.ASCII)
        if match is None:
            raise ValueError(f"{key[:200]!r} is not a LoRA weight of {list(components)}")
        prefix, module, half = match.groups()
        axis, other = (0, "B") if half == "A" else (1, "A")
        if len(shape) != 2 or min(shape) < 1 or shape[axis] != ranks[prefix]:
            raise ValueError(f"'{key}' is of rank {ranks[prefix]} but has the shape {list(shape)}")
        if f"{prefix}{module}.lora_{other}.weight" not in shapes:
            raise ValueError(f"'{key}' has no matching lora_{other}")
    for part in components:
        if not any(key.startswith(LORA_PREFIXES[part]) for key in shapes):
            raise ValueError(f"it holds no weights of '{part}'")


def _check_dtypes(dtypes: Mapping[str, str]) -> None:
    for key, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"'{key}' is of type {dtype}, expected one of {list(_DTYPES)}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"'{key}' holds NaN or infinite values")
