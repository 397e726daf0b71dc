"""Judgements of the original images, which the loss compares with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_fair.vision.faces import Faces


@dataclass(frozen=True)
class Originals:
    """Judgements of the original model's images o_i for the same prompts and noise."""

    faces: Faces
    classes: dict[str, Tensor]
    """Attribute name -> (rows,) class index for each row of the faces. Meaningless in placeholders,
    unless the attribute is one of the whole image."""
    features: tuple[Tensor, Tensor]
    """CLIP and DINO features, (n, d) each, of unit length."""
    is_certain: Tensor
    """(rows,) bool: whether the probabilities of all classes of a face reach their thresholds."""
    embeddings: Tensor | None = None
    """(rows, d) of the faces, of unit length. None: no face realism loss."""

    def __getitem__(self, images: Tensor) -> "Originals":
        """Select images by their indices (m,)."""
        faces, rows = self.faces.of_images(images)
        return Originals(
            faces,
            {name: labels[rows] for name, labels in self.classes.items()},
            (self.features[0][images], self.features[1][images]),
            self.is_certain[rows],
            None if self.embeddings is None else self.embeddings[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence["Originals"]) -> "Originals":
        """Concatenate the originals of several batches."""
        embeddings = [part.embeddings for part in parts if part.embeddings is not None]
        clip, dino = (torch.cat(x) for x in zip(*(part.features for part in parts), strict=True))
        return cls(
            Faces.joined([part.faces for part in parts]),
            {name: torch.cat([part.classes[name] for part in parts]) for name in parts[0].classes},
            (clip, dino),
            torch.cat([part.is_certain for part in parts]),
            torch.cat(embeddings) if embeddings else None,
        )
