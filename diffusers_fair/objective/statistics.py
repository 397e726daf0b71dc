"""Statistics of the images of a batch over all processes, and the metrics that are logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.metrics import bias, frequencies


@dataclass(frozen=True, kw_only=True)
class ClassStatistics:
    """Classes of one attribute, among the faces or the whole images of a batch."""

    classes: tuple[str, ...]
    shares: tuple[float, ...]
    """Share of each class."""
    bias: float
    """Mean over the prompts with any face, or image."""
    target: tuple[float, ...] | None = None
    """Target shares, averaged over the faces or images. None: no prompt has its own target."""


@dataclass(frozen=True, kw_only=True)
class KeptStatistics:
    """Losses of kept prompts; None is a loss that the recipe does not use."""

    loss: float | None = None
    """Loss of their images."""
    obeyed: float | None = None
    """Share of the images that show the class that their prompt names; None if none names one."""
    embedding: float | None = None
    prediction: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return name -> value, as they are logged."""
        values = {
            "loss": self.loss,
            "obeyed": self.obeyed,
            "embedding": self.embedding,
            "prediction": self.prediction,
        }
        return {f"keep/{name}": value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Statistics of a batch."""

    losses: Mapping[str, float]
    """`loss`, then its terms: `alignment`, `semantics` and, if it has a weight, `face`."""
    face_rate: float | None
    """Share of the images with a face. None: there is no attribute of faces."""
    attributes: Mapping[str, ClassStatistics]
    """Attribute name -> statistics; without attributes of faces if no image has a face."""
    kept: KeptStatistics = field(default_factory=KeptStatistics)

    def metrics(self) -> dict[str, float]:
        """Return name -> value, as they are logged."""
        metrics = dict(self.losses)
        if self.face_rate is not None:
            metrics["faces"] = self.face_rate
        for name, x in self.attributes.items():
            metrics |= {f"bias/{name}": x.bias, f"largest/{name}": max(x.shares)}
            metrics |= _by_class("share", name, x.classes, x.shares)
        for name, x in self.attributes.items():
            if x.target is not None:
                metrics |= _by_class("target", name, x.classes, x.target)
        return metrics | self.kept.metrics()


def class_statistics(
    attribute: Attribute, probabilities: Tensor, faces: Tensor, prompts: Sequence[str]
) -> ClassStatistics | None:
    """Count the classes of a batch; None if there is nothing to count.

    Args:
        attribute: an attribute.
        probabilities: (m, classes) of the faces, or (n, classes) of the images, prompt by prompt.
        faces: (n,) number of faces in each image.
        prompts: of the images.
    """
    sizes = items_per_prompt(attribute, faces, len(prompts))
    labels = [part.argmax(1) for part in probabilities.split(sizes) if len(part)]
    if not labels:
        return None
    classes = len(attribute.classes)
    counts = [torch.bincount(y, minlength=classes).numpy(force=True) for y in labels]
    return ClassStatistics(
        classes=attribute.classes,
        shares=tuple(map(float, frequencies(np.sum(counts, axis=0)))),
        bias=float(np.mean([bias(frequencies(count)) for count in counts])),
        target=_mean_target(attribute, sizes, prompts) if attribute.targets else None,
    )


def items_per_prompt(attribute: Attribute, faces: Tensor, prompts: int) -> list[int]:
    """Return how many faces or images of each prompt count for an attribute.

    Args:
        attribute: an attribute.
        faces: (n,) number of faces in each image, equally many images of each prompt.
        prompts: number of prompts.
    """
    parts = faces.chunk(prompts)
    return [int(part.sum()) if attribute.of_faces else len(part) for part in parts]


def _mean_target(
    attribute: Attribute, sizes: Sequence[int], prompts: Sequence[str]
) -> tuple[float, ...]:
    targets = [attribute.target_of(prompt) for prompt in prompts]
    return tuple(map(float, np.average(targets, axis=0, weights=sizes)))


def _by_class(
    kind: str, name: str, classes: Sequence[str], values: Sequence[float]
) -> dict[str, float]:
    return {f"{kind}/{name}/{c}": value for c, value in zip(classes, values, strict=True)}
