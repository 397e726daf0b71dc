"""What is balanced: perceived attributes, their classes and the distribution aimed at."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """A perceived attribute as a classifier sees it, and the distribution to aim at.

    Raises:
        ValueError: fewer than two classes, a class named twice, or a target that is not a
            distribution over the classes.
    """

    name: str
    """What it is called in recipes, reports and cards."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the classifier's probabilities."""
    target: tuple[float, ...] = ()
    """Share wanted of each class; in [0, 1], sums to 1. Left out: equal shares."""

    def __post_init__(self) -> None:
        """Check the classes, fill in a uniform target, check the target."""
        object.__setattr__(self, "classes", tuple(self.classes))
        n = len(self.classes)
        if n < 2 or len(set(self.classes)) < n:
            raise ValueError(
                f"attribute '{self.name}' needs two or more different classes, "
                f"got {list(self.classes)}"
            )
        object.__setattr__(self, "target", tuple(map(float, self.target or [1 / n] * n)))
        if len(self.target) != n:
            raise ValueError(
                f"the target of attribute '{self.name}' needs {n} shares, one for each class of "
                f"{list(self.classes)}, got {len(self.target)}"
            )
        if not all(math.isfinite(share) and share >= 0 for share in self.target):
            raise ValueError(
                f"the target of attribute '{self.name}' must not hold negative shares, "
                f"got {list(self.target)}"
            )
        if abs(sum(self.target) - 1) > 1e-6:
            raise ValueError(
                f"the target of attribute '{self.name}' must sum to 1, got {list(self.target)}, "
                f"which sums to {sum(self.target):g}"
            )
