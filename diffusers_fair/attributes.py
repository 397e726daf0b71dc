"""Perceived attributes: their classes and target distributions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

Region: TypeAlias = Literal["face", "image"]
People: TypeAlias = Literal["largest", "all"]
"""Faces of an image that count: only the largest, or all."""


@dataclass(frozen=True)
class Attribute:
    """A perceived attribute: its classes and the target distribution over them.

    Raises:
        ValueError: fewer than two classes, duplicate classes, an unknown region, or a target that
            is not a distribution over the classes.
    """

    name: str
    """Name in recipes, reports and model cards."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the classifier's probabilities."""
    target: tuple[float, ...] = ()
    """Target share of each class, in [0, 1]; they sum to 1. Default: equal shares."""
    targets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Prompt -> target shares that replace `target` for this prompt."""
    region: Region = "face"
    """Region that the classifier sees: the face, or the whole image."""

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
        targets = {p: self._checked(shares, f" for '{p}'") for p, shares in self.targets.items()}
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "targets", targets)

    def target_of(self, prompt: str) -> tuple[float, ...]:
        """Return the target share of each class in the images of a prompt."""
        return self.targets.get(prompt, self.target)

    def _checked(self, shares: Sequence[float], suffix: str) -> tuple[float, ...]:
        shares, n = tuple(map(float, shares)), len(self.classes)
        what = f"the target of attribute '{self.name}'{suffix}"
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
        """Whether the classifier sees faces; images without a face are then not counted."""
        return self.region == "face"

    def json(self) -> dict[str, Any]:
        """Return JSON data. Keys that older files lack are left out if they have their default."""
        defaults = {"targets": {}, "region": "face"}
        return {k: v for k, v in asdict(self).items() if defaults.get(k) != v}
