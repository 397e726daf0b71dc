"""The models that judge images: a face detector, classifiers and encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute, People
from diffusers_fair.vision.classifiers import Classifier, view
from diffusers_fair.vision.encoders import ImageEncoder, ImageTextEncoder
from diffusers_fair.vision.faces import EveryFaceDetector, FaceDetector, Faces


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The models that judge images. Evaluation should use others than training did."""

    face_detector: FaceDetector
    classifiers: Mapping[str, Classifier]
    """Attribute name -> classifier of its classes, in any order."""
    clip: ImageTextEncoder
    """For CLIP-T and CLIP-I."""
    dino: ImageEncoder
    """For DINO."""
    extra: Mapping[str, Callable[[Tensor, Sequence[str]], Any]] = field(default_factory=dict)
    """Name -> custom score: (images (n, 3, h, w), their prompts) -> (n,), NaN where it does not
    apply. `recognition` makes one from a classifier of whole images."""

    people: People = "largest"
    """Faces of an image that count."""

    def __post_init__(self) -> None:
        """Check that the detector can detect all faces, if all count.

        Raises:
            ValueError: it cannot.
        """
        if self.people == "all" and not isinstance(self.face_detector, EveryFaceDetector):
            raise ValueError(
                "people 'all' needs a face detector with a method all_faces, as RetinaFace and the "
                f"testbed's have, and {self.face_detector!r} finds the largest alone: name another "
                "one, or count the largest"
            )

    def faces(self, images: Tensor) -> Faces:
        """Detect the faces that count in images (n, 3, h, w) in [-1, 1]."""
        if isinstance(self.face_detector, EveryFaceDetector) and self.people == "all":
            return self.face_detector.all_faces(images)
        return self.face_detector(images)

    def probabilities(self, attribute: Attribute, images: Tensor, faces: Faces) -> Tensor:
        """Return probabilities (n, classes) in the attribute's order, differentiable.

        Args:
            attribute: an attribute that has a classifier.
            images: (n, 3, h, w) in [-1, 1].
            faces: of these images, one row each; ignored for an attribute of whole images.
        """
        classifier = self.classifiers[attribute.name]
        order = [classifier.classes.index(name) for name in attribute.classes]
        return classifier(view(attribute, images, faces, classifier.size))[:, order]

    def perceive(
        self,
        attributes: Sequence[Attribute],
        images: Tensor,
        faces: Faces,
        micro_batch: int | None = None,
    ) -> list[Tensor]:
        """Classify the faces found, or the whole images, a few at a time; differentiable.

        Args:
            attributes: attributes that have classifiers.
            images: (n, 3, h, w) in [-1, 1].
            faces: of these images.
            micro_batch: faces or images to classify at a time; left out, as many as images.

        Returns:
            For each attribute probabilities (m, classes) of the m faces found, or (n, classes) of
            the images, in the attribute's order.
        """
        found, size = faces[faces.found], micro_batch or len(images)
        shown = images[faces.owner[faces.found]]  # (m, 3, h, w)
        rows = torch.arange(len(shown), device=images.device).split(size)

        def classify(a: Attribute) -> Tensor:
            if not a.of_faces:
                return torch.cat([self.probabilities(a, x, found) for x in images.split(size)])
            if not len(shown):
                return images.new_zeros(0, len(a.classes))
            return torch.cat([self.probabilities(a, shown[x], found[x]) for x in rows])

        return [classify(attribute) for attribute in attributes]


def confusion_of(attributes: Sequence[Attribute], judges: Judges) -> dict[str, list[list[float]]]:
    """Return attribute -> confusion matrix in the attribute's order, where it was measured."""
    found = {}
    for attribute in attributes:
        classifier = judges.classifiers[attribute.name]
        if classifier.confusion is not None:
            order = [classifier.classes.index(name) for name in attribute.classes]
            found[attribute.name] = [[classifier.confusion[i][j] for j in order] for i in order]
    return found


def recognition(
    classifier: Classifier, class_of: Callable[[str], str | None]
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Make a score for `Judges.extra`: is an image recognised as what its prompt names?

    Args:
        classifier: of whole images, which must have its size.
        class_of: prompt -> the class that its images should have, or None.

    Returns:
        (images (n, 3, size, size), their prompts) -> (n,): 1 right, 0 wrong, NaN not applicable.
    """

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = classifier(images).argmax(-1).tolist()
        wanted = [class_of(prompt) for prompt in prompts]
        right = [
            float("nan") if w is None else float(classifier.classes[s] == w)
            for s, w in zip(seen, wanted, strict=True)
        ]
        return torch.tensor(right)

    return score
