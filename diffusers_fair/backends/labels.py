"""Labels of a foreign classifier -> classes of an attribute; several labels may make one class."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Groups = dict[str, list[int]]
"""Class -> positions of its labels."""


def group(labels: Sequence[str], classes: Mapping[str, Sequence[str]]) -> Groups:
    """Find the labels of each class.

    Args:
        labels: of the model, in the order of its logits.
        classes: class -> its labels, in any case; empty if the labels are the classes.

    Raises:
        ValueError: a label that the model does not have, or one that has no class or two.
    """
    if not classes:
        return {label: [i] for i, label in enumerate(labels)}
    places = {label.casefold(): i for i, label in enumerate(labels)}
    asked = [(name, word) for name, words in classes.items() for word in words]
    for name, word in asked:
        if word.casefold() not in places:
            raise ValueError(f"class '{name}' has the label '{word}', the model has {list(labels)}")
    groups = {name: [places[w.casefold()] for w in words] for name, words in classes.items()}
    used = [place for places_of in groups.values() for place in places_of]
    for i, label in enumerate(labels):
        if used.count(i) != 1:
            raise ValueError(
                f"every label of the model must be in one class, '{label}' is in {used.count(i)}"
            )
    return groups


def merge(network: Callable[[Tensor], Tensor], groups: Groups) -> Callable[[Tensor], Tensor]:
    """Make logits (n, classes) out of logits (n, labels), so that probabilities are summed."""

    def merged(x: Tensor) -> Tensor:
        logits = network(x)  # (n, labels)
        return torch.stack([logits[:, i].logsumexp(1) for i in groups.values()], 1)

    return merged


def merge_counts(
    confusion: Sequence[Sequence[float]], groups: Groups
) -> tuple[tuple[float, ...], ...]:
    """Make a confusion matrix (classes, classes) out of one of (labels, labels), counts."""
    return tuple(
        tuple(sum(confusion[i][j] for i in rows for j in columns) for columns in groups.values())
        for rows in groups.values()
    )
