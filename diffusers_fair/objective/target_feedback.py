"""Targets of training that move against a gap which lasts: integral control. Pure.

The alignment loss pulls the less the nearer the target is, the semantics loss all the time: where
the two balance, a gap is left, the wider for the class that is farthest from the original images.
The published method leaves it. Here the gap between target D and the shares p of the classes among
the faces of the batches so far (an exponential moving average) adds up, and moves the target of the
transport:

    D' = D + e,   e <- clip(e + gain (D - p), -D / 2, D / 2)   where |D - p| <= D / 2 in every class

Farther off nothing adds up: the loss pulls there by itself, and the sum would overshoot.

Images answer a moved target only after some tens of iterations. A gain much above the inverse of
that lets the classes swing about the target, and chance say which way they lean at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MEMORY = 0.9  # of the moving average: about ten batches
REACH = 0.5  # of a class's share, for its gap and for how far its target moves


class Steering:
    """The target of one attribute, as training aims for it.

    Args:
        target: (classes,), D.
        gain: share of the gap that is added in each iteration; 0: the target stays.
    """

    def __init__(self, target: Sequence[float], gain: float):
        self.wanted = torch.tensor(target, dtype=torch.float64)
        self.gain = gain
        self.seen = self.wanted.clone()
        self.offset = torch.zeros_like(self.wanted)

    @property
    def target(self) -> Tensor:
        """(classes,), D', float64; sums to 1."""
        return self.moved(self.wanted)

    def moved(self, target: Sequence[float] | Tensor) -> Tensor:
        """(classes,), where a prompt's own target (classes,) goes, float64; sums to 1."""
        target = torch.as_tensor(target, dtype=torch.float64)
        moved = target + self.offset.clamp(-REACH * target, REACH * target)
        return moved / moved.sum()

    def record(self, shares: Sequence[float], target: Sequence[float] | None = None) -> None:
        """Take note of a batch.

        Args:
            shares: (classes,), of its faces.
            target: (classes,), the mean of its prompts' targets; left out, D.
        """
        found = torch.tensor(shares, dtype=torch.float64)
        if target is not None:
            found = found + (self.wanted - torch.as_tensor(target, dtype=torch.float64))
        self.seen = MEMORY * self.seen + (1 - MEMORY) * found
        gap, reach = self.wanted - self.seen, REACH * self.wanted
        if (gap.abs() <= reach).all():
            self.offset = (self.offset + self.gain * gap).clamp(-reach, reach)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seen": self.seen, "offset": self.offset}

    def take(self, state: dict[str, Any]) -> None:
        """Be where a checkpoint was."""
        self.seen, self.offset = state["seen"], state["offset"]
