"""The fingerprint of a base model, by which adapters are matched to it."""

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from diffusers_fair.families import family_of

_ADDED = (".lora_", ".to_qkv.", ".to_kv.")  # diffusers keeps fused projections after unfusing


def base_fingerprint(pipe: Any) -> str:
    """Hash the parameter shapes of the components that can have an adapter.

    It does not depend on LoRA layers, soft tokens, textual inversions or fused projections in the
    pipeline, on the dtype, on quantization, or on how a library version names the parameters.
    Models of one architecture share it.

    Raises:
        ValueError: a pipeline of no known family.
    """
    family = family_of(pipe)
    shapes = sorted(
        f"{component} {shape}"
        for component in family.targets
        if getattr(pipe, component, None) is not None
        for shape in _base_shapes(pipe, component, family.inversions.get(component))
    )
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def _base_shapes(pipe: Any, component: str, tokenizer: str | None) -> Iterator[tuple[int, ...]]:
    """Shapes of a component's parameters, without LoRA layers and added tokens."""
    model = getattr(pipe, component)
    embeddings: list[Any] = []  # the vocabulary, and soft tokens in training
    if tokenizer is not None:
        embeddings = list(model.get_input_embeddings().parameters())
        yield getattr(pipe, tokenizer).vocab_size, embeddings[0].shape[1]
    for name, parameter in model.named_parameters():
        is_added = any(part in name for part in _ADDED)
        if not is_added and not any(parameter is other for other in embeddings):
            yield _shape(model, name)


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Shape of a parameter; that of a linear layer's weight before it was packed in 4 bits."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, nn.Linear) and leaf == "weight":
        return layer.out_features, layer.in_features
    return tuple(model.get_parameter(name).shape)
