"""Digest of a pipeline's architecture."""

import hashlib
from collections.abc import Iterator
from typing import Any

from diffusers_fair.adapters.format import PREFIXES


def base_fingerprint(pipe: Any) -> str:
    """Digest of the parameter shapes of a pipeline's text encoder and U-Net.

    The same with and without low-rank layers, soft tokens or textual inversions on them, in every
    dtype and under every version's names; another for every other architecture. Weights of one
    architecture share it.
    """
    shapes = sorted(
        f"{part} {shape}"
        for part in PREFIXES
        if getattr(pipe, part, None) is not None
        for shape in _own_shapes(pipe, getattr(pipe, part))
    )
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()


def _own_shapes(pipe: Any, model: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of a model's own parameters; tokens that were added to its vocabulary do not count."""
    words: list[Any] = []  # the vocabulary, and soft tokens in training
    if model is pipe.text_encoder:
        words = list(model.get_input_embeddings().parameters())
        yield pipe.tokenizer.vocab_size, words[0].shape[1]
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and not any(parameter is word for word in words):
            yield tuple(parameter.shape)
