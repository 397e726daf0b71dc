"""What is balanced: perceived attributes, their classes and the distribution aimed at."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Region: TypeAlias = Literal["face", "image"]


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
    region: Region = "face"
    """What the classifier sees: the face, or the whole image, with or without one."""

    def __post_init__(self) -> None:
        """Check the classes, fill in a uniform target, check the target."""
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

    @property
    def of_faces(self) -> bool:
        """Whether the classifier sees faces: images without one are not counted."""
        return self.region == "face"

    def json(self) -> dict[str, Any]:
        """As files have it: the region only where it is not the face, as in older ones."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if k != "region" or not self.of_faces}
