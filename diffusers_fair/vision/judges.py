"""The models that judge images: a face detector, classifiers and encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute, People
from diffusers_fair.vision.classifiers import Classifier, classifier_input
from diffusers_fair.vision.encoders import ImageEncoder, ImageTextEncoder
from diffusers_fair.vision.faces import EveryFaceDetector, FaceDetector, Faces


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The models that judge images. Evaluation should use other models than training."""

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
    """Faces of an image that count: only the largest, or all."""
    device: Any = None
    """Device of the models, which images are moved to; None: images stay where they are."""

    def __post_init__(self) -> None:
        """Check that the detector can detect all faces, if all count.

        Raises:
            ValueError: it only detects the largest.
        """
        if self.people == "all" and not isinstance(self.face_detector, EveryFaceDetector):
            raise ValueError(
                "people 'all' needs a face detector with a method all_faces, such as RetinaFace or "
                f"the testbed's, but {self.face_detector!r} only finds the largest face: choose "
                "another detector, or people 'largest'"
            )

    def on_device(self, images: Tensor) -> Tensor:
        """Move images to the device of the models, differentiably."""
        return images if self.device is None else images.to(self.device)

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
        return classifier(classifier_input(attribute, images, faces, classifier.size))[:, order]

    def perceive(
        self,
        attributes: Sequence[Attribute],
        images: Tensor,
        faces: Faces,
        micro_batch: int | None = None,
    ) -> list[Tensor]:
        """Classify all faces, or the whole images, in micro-batches; differentiable.

        Args:
            attributes: attributes that have classifiers.
            images: (n, 3, h, w) in [-1, 1].
            faces: of these images.
            micro_batch: faces or images to classify at a time; default: as many as images.

        Returns:
            For each attribute probabilities (m, classes) of the m faces, or (n, classes) of the
            images, in the attribute's order.
        """
        real, size = faces[faces.is_face], micro_batch or len(images)
        shown = images[faces.image_index[faces.is_face]]  # (m, 3, h, w)
        rows = torch.arange(len(shown), device=images.device).split(size)

        def classify(a: Attribute) -> Tensor:
            if not a.of_faces:
                return torch.cat([self.probabilities(a, x, real) for x in images.split(size)])
            if not len(shown):
                return images.new_zeros(0, len(a.classes))
            return torch.cat([self.probabilities(a, shown[x], real[x]) for x in rows])

        return [classify(attribute) for attribute in attributes]


def confusion_of(attributes: Sequence[Attribute], judges: Judges) -> dict[str, list[list[float]]]:
    """Return attribute -> confusion matrix in the attribute's order, if it was measured."""
    confusions = {}
    for attribute in attributes:
        classifier = judges.classifiers[attribute.name]
        if classifier.confusion is not None:
            order = [classifier.classes.index(name) for name in attribute.classes]
            confusions[attribute.name] = [
                [classifier.confusion[i][j] for j in order] for i in order
            ]
    return confusions


def recognition(
    classifier: Classifier, class_of: Callable[[str], str | None]
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Make a score for `Judges.extra`: whether an image is recognised as what its prompt names.

    Args:
        classifier: a classifier of whole images, which must have its input size.
        class_of: prompt -> the class that its images should have, or None.

    Returns:
        (images (n, 3, size, size), their prompts) -> (n,): 1 right, 0 wrong, NaN not applicable.
    """

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        predicted = classifier(images).argmax(-1).tolist()
        expected = [class_of(prompt) for prompt in prompts]
        is_right = [
            float("nan") if name is None else float(classifier.classes[i] == name)
            for i, name in zip(predicted, expected, strict=True)
        ]
        return torch.tensor(is_right)

    return score
