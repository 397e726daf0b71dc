"""Real faces that generated ones should look like, and what compares them."""

from dataclasses import dataclass

from torch import Tensor

from diffusers_fair.vision.encoders import NetworkEncoder
from diffusers_fair.vision.faces import Faces, aligned_chips, face_chips


@dataclass(frozen=True)
class RealFaces:
    """A bank of real faces, and the embedder that saw them; needed in training alone."""

    embedder: NetworkEncoder
    """Of face chips."""
    bank: Tensor
    """(m, d), of unit length."""

    def embed(self, images: Tensor, faces: Faces) -> Tensor:
        """Embeddings of faces as the bank's were made: see `embed_faces`."""
        return embed_faces(self.embedder, images, faces)


def embed_faces(embedder: NetworkEncoder, images: Tensor, faces: Faces) -> Tensor:
    """What faces look like, by chips that are aligned where the detector gives landmarks.

    Args:
        embedder: of face chips.
        images: (n, 3, h, w) in [-1, 1].
        faces: of these images, one row each; rows without a face are without meaning.

    Returns:
        (n, d), of unit length, differentiable with respect to the images.
    """
    cut = face_chips if faces.landmarks is None else aligned_chips
    return embedder(cut(images, faces, embedder.pixels.size))
