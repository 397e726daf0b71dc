"""The semantics loss: images should look like the original ones, less so where a class changes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_fair.config.schema import AttributeSection
from diffusers_fair.objective.losses import scale_gradient, semantics_loss
from diffusers_fair.objective.originals import Originals
from diffusers_fair.vision.faces import Faces, inside_faces
from diffusers_fair.vision.judges import Judges


class Semantics:
    """The semantics loss of equation 7, with the weights of section 4.1.

    Args:
        judges: judges of training.
        attributes: the recipe's sections, with `semantics_changed` and `semantics_face`.
        weight: lambda_1.
    """

    def __init__(self, judges: Judges, attributes: Sequence[AttributeSection], weight: float):
        self.judges = judges
        self.weight = weight
        self.fractions = [section.semantics_changed for section in attributes]
        # an attribute of the whole image does not change the weight of faces
        self.face_fractions = [
            section.semantics_face if section.attribute().of_faces else 1.0
            for section in attributes
        ]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP and DINO features (n, d) of images (n, 3, h, w)."""
        return self.judges.clip(images), self.judges.dino(images)

    def __call__(
        self, images: Tensor, faces: Faces, originals: Originals, changes: Tensor
    ) -> Tensor:
        """Weighted loss of each image (n,): smaller where a class changes, smallest on the face.

        If several attributes of an image are to change, the smallest fraction applies.

        Args:
            images: (n, 3, h, w) in [-1, 1].
            faces: faces of these images.
            originals: judgements of the original images for the same prompts and noise.
            changes: (n, attributes) bool, which classes should change; True for attributes of faces
                in images without a face.
        """
        outside = _smallest(self.fractions, changes)  # (n,)
        inside = _smallest(self.face_fractions, changes)[:, None, None]
        is_face = inside_faces(faces, images) & inside_faces(originals.faces, images)  # (n, h, w)
        images = scale_gradient(images, torch.where(is_face, inside, 1.0)[:, None])
        pairs = zip(self.features(images), originals.features, strict=True)
        loss = sum(semantics_loss(x, o) for x, o in pairs)  # equation 7
        return self.weight * outside * loss


def _smallest(fractions: Sequence[float], changes: Tensor) -> Tensor:
    """(n,) smallest fraction of the attributes that change (n, attributes); 1 if none does."""
    return torch.where(changes, torch.tensor(fractions, device=changes.device), 1.0).amin(1)
