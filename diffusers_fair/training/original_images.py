"""What training looked up in the original images, kept on disk: they never change.

One file for each batch, or for each process's share of it, named by everything the originals
depend on. Files are written whole or not at all, mapped into memory when read, and may be deleted
or damaged at any time: they are then made again.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusers_fair import atomic
from diffusers_fair.objective.objective import Originals
from diffusers_fair.vision.faces import Faces


class OriginalsBank:
    """Originals of batches, made once.

    Args:
        folder: where the files go; made when the first one is written.
        about: what all originals depend on: base model, judges, attributes. JSON data.
    """

    def __init__(self, folder: Path, about: Any):
        self.folder = folder
        self.about = about

    def get(self, batch: Any, make: Callable[[], Originals], device: torch.device) -> Originals:
        """The originals of a batch: from the disk, or made and put there.

        Args:
            batch: what tells it from others: prompts, noise, steps. JSON data.
            make: draws the original images and looks at them.
            device: where the tensors go.

        Raises:
            OSError: the file cannot be written.
        """
        told = json.dumps([self.about, batch], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"
        try:
            return _unpacked(load_file(file, device=str(device)))
        except (FileNotFoundError, SafetensorError):
            originals = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write(file, save(_packed(originals)))
        return originals


def _packed(originals: Originals) -> dict[str, Tensor]:
    """Name -> tensor, for a file."""
    clip, dino = originals.features
    tensors = {
        "boxes": originals.faces.boxes,
        "found": originals.faces.found,
        "landmarks": originals.faces.landmarks,
        "image": originals.faces.image,
        "clip": clip,
        "dino": dino,
        "sure": originals.sure,
        "embeddings": originals.embeddings,
    } | {f"class/{name}": numbers for name, numbers in originals.classes.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def _unpacked(tensors: dict[str, Tensor]) -> Originals:
    faces = Faces(
        tensors["boxes"], tensors["found"], tensors.get("landmarks"), tensors.get("image")
    )
    classes = {
        name.removeprefix("class/"): numbers
        for name, numbers in tensors.items()
        if name.startswith("class/")
    }
    features = tensors["clip"], tensors["dino"]
    return Originals(faces, classes, features, tensors["sure"], tensors.get("embeddings"))
