"""Feedback that shifts the training target against a persistent gap: integral control. Pure.

The alignment loss weakens near the target, the semantics loss does not. A gap remains where the two
balance, widest for the class that is farthest from the original images. The published method does
not close it. Here the gap between the target D and the shares p of the classes (an exponential
moving average over batches) is integrated, and shifts the target of the transport:

    D' = D + e,   e <- clip(e + gain (D - p), -D / 2, D / 2)   if |D - p| <= D / 2 in every class

A wider gap is not integrated: the loss closes it by itself, and the integral would overshoot.

Images respond to a shifted target only after some tens of iterations. With a gain much above the
inverse of that, the shares oscillate about the target, and end up anywhere.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DECAY = 0.9  # decay of the moving average: about ten batches
_REACH = 0.5  # largest gap that is integrated, and largest shift, relative to a class's share


class TargetFeedback:
    """The training target of one attribute.

    Args:
        target: (classes,), D.
        gain: fraction of the gap that is added in each iteration; 0: the target stays.
    """

    def __init__(self, target: Sequence[float], gain: float):
        self.target = torch.tensor(target, dtype=torch.float64)  # (classes,), D
        self.gain = gain
        self.mean_shares = self.target.clone()  # (classes,), p
        self.offset = torch.zeros_like(self.target)  # (classes,), e

    def shifted(self, target: Sequence[float] | Tensor | None = None) -> Tensor:
        """Return the training target: a target shifted by the integrated gap.

        Args:
            target: (classes,), target of a prompt; default: D.

        Returns:
            (classes,) float64, sums to 1.
        """
        wanted = self.target if target is None else torch.as_tensor(target, dtype=torch.float64)
        shifted = wanted + self.offset.clamp(-_REACH * wanted, _REACH * wanted)
        return shifted / shifted.sum()

    def update(self, shares: Sequence[float], target: Sequence[float] | None = None) -> None:
        """Integrate the gap of a batch.

        Args:
            shares: (classes,), shares among the batch's faces or images.
            target: (classes,), mean target of the batch's prompts; default: D.
        """
        observed = torch.tensor(shares, dtype=torch.float64)
        if target is not None:
            observed = observed + (self.target - torch.as_tensor(target, dtype=torch.float64))
        self.mean_shares = _DECAY * self.mean_shares + (1 - _DECAY) * observed
        gap, reach = self.target - self.mean_shares, _REACH * self.target
        if (gap.abs() <= reach).all():
            self.offset = (self.offset + self.gain * gap).clamp(-reach, reach)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"seen": self.mean_shares, "offset": self.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.mean_shares, self.offset = state["seen"], state["offset"]
