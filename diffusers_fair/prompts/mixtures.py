"""Mixtures: the prompts of several sets in fixed shares, for one adapter that aligns them all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from diffusers_fair.prompts import prompt_set

LONGEST_CYCLE = 1000
T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class PromptMixture(Generic[P]):
    """An endless sequence of prompts that depends on the seed alone: nothing to save or resume.

    The sequence consists of cycles. Every cycle holds each set exactly `counts` times, in random
    order; every prompt of a set comes once, in random order, before any of that set comes again.
    A single set is thus simply shuffled anew whenever it has been used up.
    """

    prompts: tuple[tuple[P, ...], ...]
    """The prompts of each set."""
    counts: tuple[int, ...]
    """How often each set comes in a cycle."""
    seed: int = 0

    def prompt(self, place: int) -> P:
        """The prompt at a place of the sequence, counted from 0."""
        cycle, position = divmod(place, sum(self.counts))
        sets = [s for s, count in enumerate(self.counts) for _ in range(count)]
        sets = self._shuffled(sets, stream=len(self.counts), turn=cycle)
        s = sets[position]
        earlier = cycle * self.counts[s] + sets[:position].count(s)  # prompts of s before this one
        turn, index = divmod(earlier, len(self.prompts[s]))
        return self._shuffled(self.prompts[s], stream=s, turn=turn)[index]

    def _shuffled(self, items: Sequence[T], stream: int, turn: int) -> list[T]:
        """The items in the order that belongs to a stream (of a set; or of the sets) and a turn."""
        g = torch.Generator().manual_seed(7_919 * self.seed + 1_000_003 * stream + turn)
        return [items[i] for i in torch.randperm(len(items), generator=g).tolist()]


def prompt_mixture(
    weights: Mapping[str, float], *, split: str = "train", seed: int = 0
) -> PromptMixture[str]:
    """The mixture of prompt sets whose shares are proportional to their weights.

    Args:
        weights: what `prompt_set` takes -> weight, as in `{"occupations": 0.5, "sports": 0.5}`;
            they need not add up to 1.
        split: of every set.
        seed: of all orders.

    Raises:
        ValueError: no sets, or weights as `counts_per_cycle` refuses them; a set that does not
            exist or has no such split.
    """
    if not weights:
        raise ValueError('there are no prompt sets to mix: give some, as in {"occupations": 1}')
    counts = counts_per_cycle(list(weights.values()))
    return PromptMixture(
        tuple(tuple(prompt_set(name).prompts(split)) for name in weights), counts, seed
    )


def counts_per_cycle(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the weights: (0.5, 0.3, 0.2) -> (5, 3, 2).

    Raises:
        ValueError: a weight that is not a positive number, or a proportion whose whole numbers add
            up to more than 1000.
    """
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"expected positive weights, got {list(weights)}: leave out unused sets")
    total = math.fsum(weights)
    for length in range(1, LONGEST_CYCLE + 1):
        exact = [length * w / total for w in weights]
        counts = tuple(round(n) for n in exact)
        if min(counts) > 0 and all(abs(n - c) < 1e-6 for n, c in zip(exact, counts, strict=True)):
            return counts
    raise ValueError(
        f"the weights {list(weights)} are not in the proportion of whole numbers that add up to "
        f"{LONGEST_CYCLE} or less: round them, as in 0.5, 0.3, 0.2"
    )
