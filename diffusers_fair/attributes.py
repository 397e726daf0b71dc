"""What is balanced: perceived attributes, their classes and the distribution aimed at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

Region: TypeAlias = Literal["face", "image"]
People: TypeAlias = Literal["largest", "all"]
"""Which faces of an image count: the largest, or every one."""


@dataclass(frozen=True)
class Attribute:
    """A perceived attribute as a classifier sees it, and the distribution to aim at.

    Raises:
        ValueError: fewer than two classes, a class named twice, or a target that is not a
            distribution over the classes, or an unknown region.
    """

    name: str
    """What it is called in recipes, reports and cards."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the classifier's probabilities."""
    target: tuple[float, ...] = ()
    """Share wanted of each class; in [0, 1], sums to 1. Left out: equal shares."""
    targets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Prompt -> its own shares, where other ones than `target` are wanted."""
    region: Region = "face"
    """What the classifier sees: the face, or the whole image, with or without one."""

    def __post_init__(self) -> None:
        """Check the classes, fill in a uniform target, check the targets."""
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.region not in get_args(Region):
            raise ValueError(
                f"the region of attribute '{self.name}' must be one of {get_args(Region)}, "
                f"got {self.region!r}"
            )
        n = len(self.classes)
        if n < 2 or len(set(self.classes)) < n:
            raise ValueError(
                f"attribute '{self.name}' needs two or more different classes, "
                f"got {list(self.classes)}"
            )
        target = self._checked(self.target or [1 / n] * n, "")
        own = {prompt: self._checked(x, f" for '{prompt}'") for prompt, x in self.targets.items()}
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "targets", own)

    def target_of(self, prompt: str) -> tuple[float, ...]:
        """Share wanted of each class in the images of a prompt."""
        return self.targets.get(prompt, self.target)

    def _checked(self, shares: Sequence[float], whose: str) -> tuple[float, ...]:
        shares, n = tuple(map(float, shares)), len(self.classes)
        what = f"the target of attribute '{self.name}'{whose}"
        if len(shares) != n:
            raise ValueError(
                f"{what} needs {n} shares, one for each class of {list(self.classes)}, "
                f"got {len(shares)}"
            )
        if not all(math.isfinite(share) and share >= 0 for share in shares):
            raise ValueError(f"{what} must not hold negative shares, got {list(shares)}")
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"{what} must sum to 1, got {list(shares)}, which sums to {sum(shares):g}"
            )
        return shares

    @property
    def of_faces(self) -> bool:
        """Whether the classifier sees faces: images without one are not counted."""
        return self.region == "face"

    def json(self) -> dict[str, Any]:
        """As files have it: what older ones lack only where it is not the usual."""
        usual = {"targets": {}, "region": "face"}
        return {k: v for k, v in asdict(self).items() if usual.get(k) != v}
