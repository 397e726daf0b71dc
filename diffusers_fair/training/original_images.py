"""Cache of judgements of the original images on disk, which stay valid as the base model is frozen.

There is one file for each batch, or for each process's part of it, named by a hash of everything
that the original images depend on. Files are written atomically. A file that is missing or damaged
is computed again.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffusers_fair import atomic, strict_json
from diffusers_fair.config.models import SETUP_KEYS
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.objective.originals import Originals
from diffusers_fair.vision.faces import Faces


class OriginalImageCache:
    """Cache of the judgements of the original images of each batch.

    Args:
        folder: folder of the files; created with the first of them.
        run_key: JSON data on what all original images depend on: base model, judges, attributes.
    """

    def __init__(self, folder: Path, run_key: Any):
        self.folder = folder
        self.run_key = run_key

    def get(
        self, batch_key: Any, compute: Callable[[], Originals], device: torch.device
    ) -> Originals:
        """Read the judgements of a batch from the disk, or compute and write them.

        Args:
            batch_key: JSON data that identifies the batch: prompts, noise, steps.
            compute: generates and judges the original images.
            device: device of the tensors.

        Raises:
            OSError: the file cannot be written.
        """
        key = strict_json.dumps([self.run_key, batch_key], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        try:
            return _from_tensors(load_file(file, device=str(device)))
        except (FileNotFoundError, SafetensorError):
            originals = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write(file, save(_to_tensors(originals)))
        return originals


def run_cache_key(config: RunConfig) -> Any:
    """Return JSON data on what judgements of original images depend on besides the batch."""
    unused = {"words", "nouns", "target_feedback", "targets", "region"}
    key = config.model_dump(
        mode="json",
        include={"base", "attributes", "models", "sampling"},
        exclude={
            "attributes": {"__all__": unused},
            "models": {"classifiers": {"__all__": SETUP_KEYS}},
        },
    )
    # newer options are included only if they are used, so that older caches stay valid
    whole = [section.name for section in config.attributes if section.region == "image"]
    key |= {"face": config.losses.face > 0} | ({"whole": whole} if whole else {})
    if key["sampling"]["size"] is None:
        del key["sampling"]["size"]
    return key | ({"people": config.people} if config.people != "largest" else {})


def _to_tensors(originals: Originals) -> dict[str, Tensor]:
    """Return name in the file -> tensor."""
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
