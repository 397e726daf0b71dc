"""Cache of what training needs of the original images, on disk: the base model never changes.

One file for each batch, or for each process's part of it, named by a hash of everything that the
original images depend on. Files are written completely or not at all, and may be deleted or damaged
at any time: they are then computed again.
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
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.objective.originals import Originals
from diffusers_fair.vision.faces import Faces


class OriginalImageCache:
    """What is needed of the original images of each batch, computed once.

    Args:
        folder: folder of the files; created with the first of them.
        run_key: what all original images depend on: base model, judges, attributes. JSON data.
    """

    def __init__(self, folder: Path, run_key: Any):
        self.folder = folder
        self.run_key = run_key

    def get(
        self, batch_key: Any, compute: Callable[[], Originals], device: torch.device
    ) -> Originals:
        """Return the originals of a batch: read from the disk, or computed and written.

        Args:
            batch_key: what distinguishes the batch: prompts, noise, steps. JSON data.
            compute: generates and judges the original images.
            device: device of the tensors.

        Raises:
            OSError: the file cannot be written.
        """
        key = json.dumps([self.run_key, batch_key], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        try:
            return _from_tensors(load_file(file, device=str(device)))
        except (FileNotFoundError, SafetensorError):
            originals = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write(file, save(_to_tensors(originals)))
        return originals


def run_cache_key(config: RunConfig) -> Any:
    """Return what the original images, and their judgements, depend on besides the batch."""
    unused = {"words", "nouns", "target_feedback", "targets", "region"}
    key = config.model_dump(
        mode="json",
        include={"base", "attributes", "models", "sampling"},
        exclude={"attributes": {"__all__": unused}},
    )
    # options that are newer than the cache's format enter only if they are used
    whole = [section.name for section in config.attributes if section.region == "image"]
    key |= {"face": config.losses.face > 0} | ({"whole": whole} if whole else {})
    return key | ({"people": config.people} if config.people != "largest" else {})


def _to_tensors(originals: Originals) -> dict[str, Tensor]:
    """Names and tensors of the file."""
    clip, dino = originals.features
    tensors = {
        "boxes": originals.faces.boxes,
        "found": originals.faces.is_face,
        "landmarks": originals.faces.landmarks,
        "image": originals.faces.image,
        "clip": clip,
        "dino": dino,
        "sure": originals.is_certain,
        "embeddings": originals.embeddings,
    } | {f"class/{name}": labels for name, labels in originals.classes.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def _from_tensors(tensors: dict[str, Tensor]) -> Originals:
    faces = Faces(
        tensors["boxes"], tensors["found"], tensors.get("landmarks"), tensors.get("image")
    )
    classes = {
        name.removeprefix("class/"): labels
        for name, labels in tensors.items()
        if name.startswith("class/")
    }
    features = tensors["clip"], tensors["dino"]
    return Originals(faces, classes, features, tensors["sure"], tensors.get("embeddings"))
