"""Measure a pipeline: generate, look, count. Knows nothing of how an adapter was trained."""

import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair import __version__
from diffusers_fair.attributes import Attribute
from diffusers_fair.classifiers import Classifier
from diffusers_fair.encoders import ImageEncoder, ImageTextEncoder
from diffusers_fair.evaluation.generate import Batch, generate
from diffusers_fair.evaluation.quality import (
    image_features,
    prompt_features,
    quality_scores,
    recognition,
)
from diffusers_fair.evaluation.report import (
    SAMPLE_IMAGES,
    SCORE_NAMES,
    Records,
    Report,
    Settings,
    pairs_picture,
    sampled,
    table,
)
from diffusers_fair.faces import FaceDetector, Faces, face_chips

__all__ = [
    "Judges",
    "Records",
    "Report",
    "Settings",
    "evaluate",
    "pairs_picture",
    "recognition",
    "table",
]

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
SAME_NOISE = ("prompts", "images_per_prompt", "steps", "guidance_scale", "seed")


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The models that look at the images; they take no gradient and should be none that trained."""

    face_detector: FaceDetector
    classifiers: Mapping[str, Classifier]
    """Attribute name -> classifier of its classes, in any order."""
    clip: ImageTextEncoder
    """For CLIP-T and CLIP-I."""
    dino: ImageEncoder
    """For DINO."""
    extra: Mapping[str, Callable[[Tensor, Sequence[str]], Any]] = field(default_factory=dict)
    """Name -> a score of one's own: (images (n, 3, h, w), their prompts) -> (n,), NaN where it does
    not apply. `quality.recognition` makes one from a classifier of whole images."""


def evaluate(
    pipe: Any,
    prompts: Sequence[str],
    attributes: Sequence[Attribute],
    *,
    judges: Judges,
    images_per_prompt: int = 60,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 24,
    reference: Report | None = None,
    label: str | None = None,
    progress: bool = True,
) -> Report:
    """Generate images of prompts and measure their bias, and how well they fit (section 5.1).

    Args:
        pipe: a text-to-image pipeline of diffusers, with or without an adapter.
        prompts: what to draw.
        attributes: what to count; where there are several their joint is counted, too.
        judges: the models that look at the images.
        images_per_prompt: images of each prompt; the fewer, the higher the floor of the bias.
        steps: scheduler steps.
        guidance_scale: of classifier-free guidance.
        seed: of the noise; the figures do not depend on the batch size.
        batch_size: images drawn and looked at together.
        reference: the base model's report with the same prompts, seed and sampling; needed for
            CLIP-I, DINO and the pictures of pairs.
        label: what this is, as a column head; left out: "base", or "adapter" with a reference.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: no prompts, no attributes, no images; a classifier that is missing or has other
            classes than its attribute; a reference that was not drawn from the same noise.
    """
    settings = Settings(
        prompts=_checked_prompts(prompts),
        attributes=_checked_attributes(attributes, judges),
        images_per_prompt=_positive(images_per_prompt, "images_per_prompt"),
        steps=_positive(steps, "steps"),
        guidance_scale=float(guidance_scale),
        seed=seed,
    )
    if reference is not None:
        _check_reference(reference.settings, settings)
    for name in judges.extra.keys() & {*SCORE_NAMES, "face_rate"}:
        raise ValueError(f"an extra score must not be called '{name}': that name is taken")
    texts = prompt_features(settings.prompts, judges.clip)  # (P, d)
    parts: list[Records] = []
    samples: dict[int, list[np.ndarray]] = {i: [] for i in sampled(len(settings.prompts))}
    for batch in generate(
        pipe,
        settings.prompts,
        images_per_prompt=settings.images_per_prompt,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        seed=seed,
        batch_size=_positive(batch_size, "batch_size"),
        progress=progress,
    ):
        parts.append(_look(batch, settings, judges, texts, reference))
        _keep(batch, samples)
    return Report(
        label=label or ("base" if reference is None else "adapter"),
        settings=settings,
        records=Records.concatenate(parts),
        samples={i: np.stack(images) for i, images in samples.items()},
        provenance=_provenance(pipe),
        reference=reference,
    )


@torch.no_grad()
def _look(
    batch: Batch,
    settings: Settings,
    judges: Judges,
    texts: np.ndarray,
    reference: Report | None,
) -> Records:
    """Everything that is recorded of a batch of images."""
    faces = judges.face_detector(batch.images)
    features = image_features(batch.images, judges.clip, judges.dino)
    base = None
    if reference is not None:
        rows = batch.prompt * settings.images_per_prompt + batch.image  # (n,)
        base = {name: values[rows] for name, values in reference.records.features.items()}
    scores = quality_scores(features, texts[batch.prompt], base)
    prompts = [settings.prompts[i] for i in batch.prompt]
    for name, score in judges.extra.items():
        scores[name] = _checked_score(name, score(batch.images, prompts), len(prompts))
    return Records(
        prompt=batch.prompt,
        image=batch.image,
        seed=batch.seed,
        found=faces.found.cpu().numpy(),
        boxes=np.round(faces.boxes.double().cpu().numpy(), 2),
        probabilities=_probabilities(batch.images, faces, settings.attributes, judges),
        scores={name: np.round(values.astype(float), 6) for name, values in scores.items()},
        features=features,
    )


def _probabilities(
    images: Tensor, faces: Faces, attributes: Sequence[Attribute], judges: Judges
) -> dict[str, np.ndarray]:
    """Attribute -> probabilities (n, classes) in the attribute's order; 0 without a face."""
    shown = images[faces.found]
    chips: dict[int, Tensor] = {}  # by size: classifiers share them
    result = {}
    for attribute in attributes:
        result[attribute.name] = np.zeros((len(images), len(attribute.classes)))
        if not len(shown):
            continue
        classifier = judges.classifiers[attribute.name]
        if classifier.size not in chips:
            chips[classifier.size] = face_chips(shown, faces[faces.found], classifier.size)
        p = classifier(chips[classifier.size]).double().cpu().numpy()  # (faces, classes)
        if not np.isfinite(p).all():
            raise ValueError(
                f"the classifier of '{attribute.name}' gave probabilities that are not finite: "
                "check its weights and precision"
            )
        order = [classifier.classes.index(name) for name in attribute.classes]
        result[attribute.name][faces.found.cpu().numpy()] = np.round(p[:, order], 6)
    return result


def _keep(batch: Batch, samples: dict[int, list[np.ndarray]]) -> None:
    """Put the first images of the sampled prompts aside, as (h, w, 3) uint8."""
    for image, i, j in zip(batch.images, batch.prompt, batch.image, strict=True):
        if i in samples and j < SAMPLE_IMAGES:
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            samples[i].append(pixels.permute(1, 2, 0).cpu().numpy())


def _checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got one string: use [{prompts!r}]")
    if not prompts:
        raise ValueError(
            "there are no prompts to evaluate: give one or more, for example "
            "prompt_set('testbed-occupations').prompts('test')"
        )
    return tuple(prompts)


def _checked_attributes(attributes: Sequence[Attribute], judges: Judges) -> tuple[Attribute, ...]:
    if not attributes:
        raise ValueError("there are no attributes to evaluate: give one or more")
    names = [a.name for a in attributes]
    if len(set(names)) < len(names):
        raise ValueError(f"attributes must have different names, got {names}")
    for attribute in attributes:
        if attribute.name not in judges.classifiers:
            raise ValueError(
                f"there is no classifier for attribute '{attribute.name}': judges.classifiers has "
                f"{sorted(judges.classifiers)}"
            )
        classes = judges.classifiers[attribute.name].classes
        if set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier knows {list(classes)}: they must be the same"
            )
    return tuple(attributes)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value


def _checked_score(name: str, values: Any, images: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (images,):
        raise ValueError(
            f"extra score '{name}' must give one number per image, expected shape ({images},), "
            f"got {array.shape}"
        )
    return array


def _check_reference(reference: Settings, settings: Settings) -> None:
    for name in SAME_NOISE:
        theirs, mine = getattr(reference, name), getattr(settings, name)
        if theirs != mine:
            shown = "" if name == "prompts" else f" ({theirs} there, {mine} here)"
            raise ValueError(
                f"the reference was made with other {name}{shown}: images can be compared only if "
                f"{', '.join(SAME_NOISE)} are the same"
            )


def _provenance(pipe: Any) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "versions": {
            "python": platform.python_version(),
            "diffusers-fair": __version__,
            **{name: version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(pipe.device),
        },
    }
