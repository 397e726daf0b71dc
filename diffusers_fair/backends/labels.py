"""Mapping from the labels of a classifier to the classes of an attribute."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Groups = dict[str, list[int]]
"""Class -> indices of its labels."""


def group(labels: Sequence[str], classes: Mapping[str, Sequence[str]]) -> Groups:
    """Group the labels of a model by class.

    Args:
        labels: the model's labels, in the order of its logits.
        classes: class -> its labels, case-insensitive; empty if the labels are the classes.

    Raises:
        ValueError: the model lacks a label, or one of its labels is not in exactly one class.
    """
    if not classes:
        return {label: [i] for i, label in enumerate(labels)}
    indices = {label.casefold(): i for i, label in enumerate(labels)}
    pairs = [(name, word) for name, words in classes.items() for word in words]
    for name, word in pairs:
        if word.casefold() not in indices:
            raise ValueError(
                f"class '{name}' has the label '{word}', but the model has {list(labels)}"
            )
    groups = {name: [indices[w.casefold()] for w in words] for name, words in classes.items()}
    used = [index for of_class in groups.values() for index in of_class]
    for i, label in enumerate(labels):
        if used.count(i) != 1:
            raise ValueError(
                f"every label of the model must be in one class, not '{label}' in {used.count(i)}"
            )
    return groups


def merge(network: Callable[[Tensor], Tensor], groups: Groups) -> Callable[[Tensor], Tensor]:
    """Turn logits (n, labels) into logits (n, classes), summing the probabilities."""

    def merged(x: Tensor) -> Tensor:
        logits = network(x)  # (n, labels)
        return torch.stack([logits[:, i].logsumexp(1) for i in groups.values()], 1)

    return merged


def merge_counts(
    confusion: Sequence[Sequence[float]], groups: Groups
) -> tuple[tuple[float, ...], ...]:
    """Turn confusion counts (labels, labels) into counts (classes, classes)."""
    return tuple(
        tuple(sum(confusion[i][j] for i in rows for j in columns) for columns in groups.values())
        for rows in groups.values()
    )
