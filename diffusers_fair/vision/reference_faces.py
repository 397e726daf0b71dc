"""Reference faces: real faces that generated ones should look like, and how to compare them."""

from dataclasses import dataclass

from torch import Tensor

from diffusers_fair.vision.encoders import NetworkEncoder
from diffusers_fair.vision.faces import Faces, aligned_chips, face_chips


@dataclass(frozen=True)
class ReferenceFaces:
    """Embeddings of real faces, and their embedder; only training needs them."""

    embedder: NetworkEncoder
    """Embedder of face chips."""
    embeddings: Tensor
    """(m, d), of unit length."""

    def embed(self, images: Tensor, faces: Faces) -> Tensor:
        """Embed faces as the reference faces were embedded: see `embed_faces`."""
        return embed_faces(self.embedder, images, faces)


def embed_faces(embedder: NetworkEncoder, images: Tensor, faces: Faces) -> Tensor:
    """Embed faces: aligned chips if the detector gives landmarks, else square crops.

    Args:
        embedder: embeds face chips.
        images: (n, 3, h, w) in [-1, 1].
        faces: of these images, one row each; rows without a face give meaningless embeddings.

    Returns:
        (n, d), of unit length, differentiable with respect to the images.
    """
    cut = face_chips if faces.landmarks is None else aligned_chips
    return embedder(cut(images, faces, embedder.pixels.size))
