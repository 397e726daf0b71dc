"""Prompt mixtures: the prompts of several sets in fixed proportions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from diffusers_fair.prompts import prompt_set

_LONGEST_CYCLE = 1000
T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class PromptMixture(Generic[P]):
    """An endless sequence of prompts. It depends only on the seed, so it has no state to save.

    The sequence consists of cycles. Each cycle contains `counts[s]` prompts of set s, in random
    order. All prompts of a set occur once, in random order, before any of them repeats. A single
    set is thus reshuffled whenever it has been used up.
    """

    prompts: tuple[tuple[P, ...], ...]
    """The prompts of each set."""
    counts: tuple[int, ...]
    """Prompts of each set in a cycle."""
    seed: int = 0

    def prompt(self, place: int) -> P:
        """Return the prompt at a place of the sequence, counted from 0."""
        cycle, position = divmod(place, sum(self.counts))
        sets = [s for s, count in enumerate(self.counts) for _ in range(count)]
        sets = self._shuffled(sets, stream=len(self.counts), turn=cycle)
        s = sets[position]
        earlier = cycle * self.counts[s] + sets[:position].count(s)  # prompts of s before this one
        turn, index = divmod(earlier, len(self.prompts[s]))
        return self._shuffled(self.prompts[s], stream=s, turn=turn)[index]

    def _shuffled(self, items: Sequence[T], stream: int, turn: int) -> list[T]:
        """Shuffle items; each set, and the order of the sets, has a random stream of its own."""
        g = torch.Generator().manual_seed(7_919 * self.seed + 1_000_003 * stream + turn)
        return [items[i] for i in torch.randperm(len(items), generator=g).tolist()]


def prompt_mixture(
    weights: Mapping[str, float], *, split: str = "train", seed: int = 0
) -> PromptMixture[str]:
    """Mix prompt sets in proportion to their weights.

    Args:
        weights: name or path of a prompt set -> weight, such as `{"occupations": 1, "sports": 1}`;
            they need not add up to 1.
        split: split of every set.
        seed: random seed of the order.

    Raises:
        ValueError: no sets, weights that `counts_per_cycle` refuses, or a set that does not exist
            or has no such split.
    """
    if not weights:
        raise ValueError('there are no prompt sets to mix: give some, as in {"occupations": 1}')
    counts = counts_per_cycle(list(weights.values()))
    return PromptMixture(
        tuple(tuple(prompt_set(name).prompts(split)) for name in weights), counts, seed
    )


def counts_per_cycle(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest integers proportional to the weights: (0.5, 0.3, 0.2) -> (5, 3, 2).

    Raises:
        ValueError: a weight that is not a positive number, or integers that add up to more than
            1000.
    """
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"expected positive weights, got {list(weights)}: leave out unused sets")
    total = math.fsum(weights)
    for length in range(1, _LONGEST_CYCLE + 1):
        exact = [length * w / total for w in weights]
        counts = tuple(round(n) for n in exact)
        if min(counts) > 0 and all(abs(n - c) < 1e-6 for n, c in zip(exact, counts, strict=True)):
            return counts
    raise ValueError(
        f"the weights {list(weights)} are not proportional to whole numbers that add up to "
        f"{_LONGEST_CYCLE} or less: round them, as in 0.5, 0.3, 0.2"
    )
