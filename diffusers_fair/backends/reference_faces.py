"""Embeddings of reference faces from a folder of images."""

from pathlib import Path

import torch
from torch import Tensor

from diffusers_fair.backends.needs import Need
from diffusers_fair.paths import expand
from diffusers_fair.vision.encoders import NetworkEncoder
from diffusers_fair.vision.faces import FaceDetector
from diffusers_fair.vision.images import from_pillow, image_files, read_image
from diffusers_fair.vision.reference_faces import embed_faces

_MAX_SIDE = 512  # pixels; larger images are downscaled
_ADVICE = "put images with faces into it, or name another face_bank"


@torch.no_grad()
def load(
    folder: str,
    detector: FaceDetector,
    embedder: NetworkEncoder,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Detect and embed the largest face of every image, one image at a time.

    Args:
        folder: folder of images, subfolders included.
        detector: face detector of the training.
        embedder: face embedder of the training.
        device: device of both models.

    Returns:
        Embeddings (m, d) of unit length; images without a face are left out.

    Raises:
        ValueError: the folder has no images, an image cannot be read, or no image has a face.
    """
    files = _image_files(folder)
    if not files:
        raise ValueError(f"face_bank '{folder}' is not a folder with images: {_ADVICE}")
    parts = []
    for file in files:
        image = _read(file).to(device)
        faces = detector(image)
        parts.append(embed_faces(embedder, image, faces)[faces.is_face])  # (0 or 1, d)
    embeddings = torch.cat(parts)
    if not len(embeddings):
        raise ValueError(
            f"face_bank '{folder}': no face was found in any of its {len(files)} images: {_ADVICE}"
        )
    return embeddings


def needs(folder: str) -> list[Need]:
    """List the requirements of `load`."""
    return [Need(f"images in '{folder}'", bool(_image_files(folder)), _ADVICE)]


def _image_files(folder: str) -> list[Path]:
    return image_files(expand(folder), "**/*")


def _read(file: Path) -> Tensor:
    """Read an image (1, 3, h, w) in [-1, 1]."""
    image = read_image(file)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return from_pillow(image)[None]
