"""Folder of pictures with faces -> their embeddings, which stand for real faces."""

from pathlib import Path

import torch
from torch import Tensor

from diffusers_fair.backends.needs import Need
from diffusers_fair.vision.encoders import NetworkEncoder
from diffusers_fair.vision.faces import FaceDetector
from diffusers_fair.vision.images import from_pillow
from diffusers_fair.vision.reference_faces import embed_faces

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST = 512  # pixels; pictures with a longer side are shrunk to it
ADVICE = f"put pictures with faces ({', '.join(SUFFIXES)}) into it, or name another face_bank"


@torch.no_grad()
def load(
    folder: str,
    detector: FaceDetector,
    embedder: NetworkEncoder,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Find and embed the largest face of every picture, one picture at a time.

    Args:
        folder: of pictures; those in folders inside it count, too.
        detector: as in training.
        embedder: as in training.
        device: where both compute.

    Returns:
        (m, d), of unit length; pictures without a face are left out.

    Raises:
        ValueError: no such folder, no pictures, a file that is none, or no face in any of them.
    """
    files = _pictures(folder)
    if not files:
        raise ValueError(f"face_bank '{folder}' is no folder with pictures in it: {ADVICE}")
    found = []
    for file in files:
        image = _read(file).to(device)
        faces = detector(image)
        found.append(embed_faces(embedder, image, faces)[faces.found])  # (0 or 1, d)
    bank = torch.cat(found)
    if not len(bank):
        raise ValueError(
            f"face_bank '{folder}': no face was found in any of its {len(files)} pictures: {ADVICE}"
        )
    return bank


def needs(folder: str) -> list[Need]:
    """List what `load` needs."""
    return [Need(f"pictures in '{folder}'", bool(_pictures(folder)), ADVICE)]


def _pictures(folder: str) -> list[Path]:
    return sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)


def _read(file: Path) -> Tensor:
    """A picture (1, 3, h, w) in [-1, 1]."""
    from PIL import Image

    try:
        picture = Image.open(file).convert("RGB")
    except OSError as error:
        raise ValueError(f"'{file}' of the face_bank is no picture: remove it") from error
    picture.thumbnail((LARGEST, LARGEST))
    return from_pillow(picture)[None]
