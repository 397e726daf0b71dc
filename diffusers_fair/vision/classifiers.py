"""Face chips or whole images -> probabilities of the classes of one attribute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.vision.encoders import resized
from diffusers_fair.vision.faces import Faces, face_chips


class Classifier(Protocol):
    """Classifies a perceived attribute of faces, or an attribute of whole images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""

    @property
    def size(self) -> int:
        """Side of its square input, in pixels."""

    @property
    def confusion(self) -> tuple[tuple[float, ...], ...] | None:
        """Counts of held-out images: a row for each true class, a column for each predicted class.

        In the order of `classes`; None if it was not measured.
        """

    def __call__(self, chips: Tensor) -> Tensor:
        """(n, 3, size, size) in [-1, 1] -> (n, classes) probabilities, differentiable."""


def classifier_input(attribute: Attribute, images: Tensor, faces: Faces, size: int) -> Tensor:
    """Crop faces or resize images for an attribute's classifier, differentiably.

    Args:
        attribute: an attribute of faces or of whole images.
        images: (n, 3, h, w).
        faces: faces of these images, one row each; ignored for attributes of whole images.
        size: side of the result in pixels.

    Returns:
        (n, 3, size, size).
    """
    return face_chips(images, faces, size) if attribute.of_faces else resized(images, size)


@dataclass(frozen=True)
class NetworkClassifier:
    """A `Classifier` made from a network that maps chips to the logits of the classes."""

    network: Callable[[Tensor], Tensor]
    """(n, 3, size, size) -> (n, classes) logits."""
    classes: tuple[str, ...]
    size: int
    confusion: tuple[tuple[float, ...], ...] | None = None

    def __call__(self, chips: Tensor) -> Tensor:
        """Compute probabilities (n, classes) for chips (n, 3, size, size) in [-1, 1].

        Raises:
            ValueError: chips of another shape, or logits for another number of classes.
        """
        if chips.ndim != 4 or chips.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"expected chips of shape (n, 3, {self.size}, {self.size}), "
                f"got {tuple(chips.shape)}; crop them with face_chips(..., size={self.size})"
            )
        logits = self.network(chips)
        if logits.shape != (len(chips), len(self.classes)):
            raise ValueError(
                f"expected logits for {len(self.classes)} classes {list(self.classes)}, "
                f"got shape {tuple(logits.shape)}"
            )
        return logits.softmax(-1)
