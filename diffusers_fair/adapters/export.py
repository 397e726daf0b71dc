"""LoRA layers and soft tokens in the layout of other programs, and back.

A layer NAME is `NAME.lora_down.weight` (rank, in), A; `NAME.lora_up.weight` (out, rank), B; and
`NAME.alpha`, a number: its output is scaled by alpha / rank.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.adapters.tensors import Weights
from diffusers_fair.families.other_programs import layer_name

_HALVES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
_ALPHA = ".alpha"
_FOREIGN = ("hada_", "lokr_", "lora_mid", "dora_scale", "oft_")  # in keys of LyCORIS and DoRA
_SOFT_TOKENS = "emb_params"


def exported_lora(info: AdapterInfo, weights: Mapping[str, Tensor]) -> Weights:
    """Return the LoRA layers of an adapter in the layout of other programs.

    Raises:
        ValueError: a layer that adapters of this family do not have.
    """
    tensors: Weights = {}
    for key, tensor in weights.items():
        half = _half(key)
        if half is None:
            continue
        layer = key.removesuffix(half)
        name = layer_name(info.family, layer)
        tensors[name + _HALVES[half]] = tensor
        tensors[name + _ALPHA] = torch.tensor(float(info.lora[layer.partition(".")[0]].alpha))
    return tensors


def exported_soft_tokens(info: AdapterInfo, weights: Mapping[str, Tensor]) -> Weights:
    """Return the soft tokens of an adapter, if it has any, in the layout of other programs."""
    return {} if info.soft_tokens is None else {_SOFT_TOKENS: weights[info.soft_tokens.token]}


def read_exported_lora(path: Path, family: str, start: Mapping[str, Tensor]) -> tuple[Weights, int]:
    """Read LoRA layers in the layout of other programs, as the start of an adapter.

    Args:
        path: a safetensors file of LoRA layers.
        family: name of the family of the adapter's pipeline.
        start: initial weights of the adapter, whose alpha is its rank. Layers that the file lacks
            keep them.

    Returns:
        The weights, and how many layers of the file the adapter does not have.

    Raises:
        ValueError: the file cannot be read, is not of this layout, has another rank or other
            sizes, or has none of the adapter's layers.
    """
    tensors = _load(path)
    _check_layout(path, tensors)
    names = {
        key: layer_name(family, key.removesuffix(half)) for key in start if (half := _half(key))
    }
    layers = _layers(tensors)
    if layers.isdisjoint(names.values()):
        expected = next(iter(names.values()), "none, as it has soft tokens alone")
        raise ValueError(
            f"'{path}' has none of the adapter's layers (the first is {expected}): choose a file "
            f"for {family}, and adapter.components that it has"
        )
    weights = dict(start)
    for key, name in names.items():
        if name in layers:
            weights[key] = _fitting(tensors, name, key, start[key])
    return weights, len(layers - set(names.values()))


def _fitting(tensors: Mapping[str, Tensor], name: str, key: str, initial: Tensor) -> Tensor:
    """Return a matrix of a layer, B with the layer's scale, if it has the initial one's shape."""
    half = _HALVES[str(_half(key))]
    tensor = tensors[name + half]
    if tensor.shape != initial.shape:
        raise ValueError(
            f"expected '{name}{half}' to be of shape {list(initial.shape)}, got "
            f"{list(tensor.shape)}: set adapter.rank to the rank of the file, and use the base "
            "model that it was made for"
        )
    alpha = tensors.get(name + _ALPHA)
    if alpha is None or key.endswith(".lora_A.weight"):
        return tensor.to(initial.dtype)
    return tensor.to(initial.dtype) * (float(alpha) / tensor.shape[1])


def _half(key: str) -> str | None:
    """Ending of a LoRA key in diffusers' layout; None for the key of soft tokens."""
    return next((half for half in _HALVES if key.endswith(half)), None)


def _layers(keys: Iterable[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def _load(path: Path) -> Weights:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' is not a complete safetensors file, copy or download it again: {error}"
        ) from error


def _check_layout(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse anything but pairs of matrices, with their alpha."""
    endings = (*_HALVES.values(), _ALPHA)
    for key, tensor in tensors.items():
        if any(part in key for part in _FOREIGN):
            raise ValueError(
                f"'{path}' holds '{key[:200]}', which is not LoRA but LyCORIS or DoRA: choose a "
                "file of plain LoRA layers"
            )
        if not key.endswith(endings):
            raise ValueError(
                f"'{path}' holds '{key[:200]}', expected LoRA layers as NAME with the endings "
                f"{', '.join(endings)}: choose a file in the layout of kohya's sd-scripts"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"'{path}' holds NaN or infinite values in '{key[:200]}'")
    for name in _layers(tensors):
        halves = [f"{name}{half}" in tensors for half in _HALVES.values()]
        if not all(halves):
            raise ValueError(f"'{path}' has only a part of the layer '{name[:200]}'")
