"""Judges and images -> what is kept of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.generate import Pictures
from diffusers_fair.evaluation.journal import Seen
from diffusers_fair.evaluation.quality import image_features, quality_scores
from diffusers_fair.prompts.groups import UNTOUCHED, PromptGroup
from diffusers_fair.reports.groups import PIXELS, THUMBNAIL, pixel_change, with_obeyed
from diffusers_fair.reports.images import (
    GROUP_SAMPLES,
    SAMPLE_IMAGES,
    SAMPLE_PROMPTS,
    sample_prompts,
)
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.vision.classifiers import view
from diffusers_fair.vision.faces import Faces
from diffusers_fair.vision.judges import Judges

THUMB = 64  # pixels, side of a thumbnail


@torch.no_grad()
def look(
    batch: Pictures,
    settings: Settings,
    judges: Judges,
    texts: np.ndarray,
    reference: Records | None,
    sampled_prompts: int = SAMPLE_PROMPTS,
) -> Seen:
    """Everything that is kept of a batch of images.

    Args:
        batch: the images.
        settings: what was asked for.
        judges: the models that look at them.
        texts: CLIP's features (P, d) of the prompts.
        reference: the base model's records of the same noise.
        sampled_prompts: prompts whose first images are kept.

    Raises:
        ValueError: a judge that gives what is not finite, or not one score for each image.
    """
    faces = judges.faces(batch.images)
    features = image_features(batch.images, judges.clip, judges.dino)
    base = None
    if reference is not None:
        rows = batch.prompt * settings.images_per_prompt + batch.image  # (n,)
        base = {name: values[rows] for name, values in reference.features.items()}
    scores = quality_scores(features, texts[batch.prompt], base)
    prompts = [settings.prompts[i] for i in batch.prompt]
    for name, score in judges.extra.items():
        scores[name] = _checked_score(name, score(batch.images, prompts), len(prompts))
    records = Records(
        prompt=batch.prompt,
        image=batch.image,
        seed=batch.seed,
        file=batch.file,
        **_people(
            faces, _probabilities(batch.images, faces, settings.attributes, judges), settings
        ),
        scores={name: np.round(values.astype(float), 6) for name, values in scores.items()},
        features=features,
    )
    return Seen(records, _samples(batch, sample_prompts(len(settings.prompts), sampled_prompts)))


@torch.no_grad()
def look_at_group(
    batch: Pictures,
    group: PromptGroup,
    settings: Settings,
    judges: Judges,
    texts: np.ndarray,
    reference: Records | None,
) -> Seen:
    """Everything that is kept of images of a group's prompts; as `look`, but for the group.

    Adds the score "obeyed", and to untouched prompts "pixels", with a reference.
    """
    judges = replace(judges, extra={})
    seen = look(batch, settings, judges, texts, reference, GROUP_SAMPLES)
    records = with_obeyed(seen.records, group.prompts, settings.attributes)
    if group.name == UNTOUCHED:
        small = thumbnails(batch.images)
        records = replace(records, features={**records.features, THUMBNAIL: small})
        if reference is not None:
            rows = batch.prompt * settings.images_per_prompt + batch.image  # (n,)
            change = np.round(pixel_change(small, reference.features[THUMBNAIL][rows]), 6)
            records = replace(records, scores={**records.scores, PIXELS: change})
    return replace(seen, records=records)


def thumbnails(images: Tensor) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1] -> (n, 3 * 64 * 64) in 0 to 255, whatever their size."""
    small = torch.nn.functional.interpolate(images.float(), (THUMB, THUMB), mode="area")
    return ((small + 1) * 127.5).round().clamp(0, 255).byte().flatten(1).cpu().numpy()


def _people(
    faces: Faces, probabilities: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, Any]:
    """The largest face of each image and, where all count, the others, as `Records` has them."""
    found, boxes = faces.found.cpu().numpy(), np.round(faces.boxes.double().cpu().numpy(), 2)
    if faces.image is None:
        return {"found": found, "boxes": boxes, "probabilities": probabilities}
    image = faces.image.cpu().numpy()
    first = np.flatnonzero(np.diff(image, prepend=-1))  # (n,) row of each image's largest face
    place = np.arange(len(image)) - first[image]  # (rows,) among the faces of the image
    rest = place > 0

    def others(values: np.ndarray) -> np.ndarray:
        spread = np.zeros((len(first), place.max(), *values.shape[1:]), values.dtype)
        spread[image[rest], place[rest] - 1] = values[rest]
        return spread

    of_faces = {a.name for a in settings.attributes if a.of_faces}
    return {
        "found": found[first],
        "boxes": boxes[first],
        "probabilities": {k: p[first] if k in of_faces else p for k, p in probabilities.items()},
        "others_found": others(found),
        "others_boxes": others(boxes),
        "others_probabilities": {k: others(p) for k, p in probabilities.items() if k in of_faces},
    }


def _probabilities(
    images: Tensor, faces: Faces, attributes: Sequence[Attribute], judges: Judges
) -> dict[str, np.ndarray]:
    """Attribute -> probabilities in the attribute's order, rounded.

    Of attributes of faces (rows, classes), 0 where there is no face; else (n, classes).
    """
    found, result = faces.found.cpu().numpy(), {}
    shown, there = images[faces.owner[faces.found]], faces[faces.found]
    views: dict[tuple[bool, int], Tensor] = {}  # classifiers share them
    for a in attributes:
        classifier, rows = judges.classifiers[a.name], found if a.of_faces else slice(None)
        result[a.name] = np.zeros((len(found if a.of_faces else images), len(a.classes)))
        if a.of_faces and not len(shown):
            continue
        key = a.of_faces, classifier.size
        if key not in views:
            views[key] = view(a, shown if a.of_faces else images, there, classifier.size)
        p = classifier(views[key]).double().cpu().numpy()  # (faces or n, classes)
        if not np.isfinite(p).all():
            raise ValueError(
                f"the classifier of '{a.name}' gave probabilities that are not finite: "
                "check its weights and precision"
            )
        order = [classifier.classes.index(name) for name in a.classes]
        result[a.name][rows] = np.round(p[:, order], 6)
    return result


def _samples(batch: Pictures, prompts: Sequence[int]) -> dict[tuple[int, int], np.ndarray]:
    """The first images of the sampled prompts, (h, w, 3) uint8."""
    return {
        (int(i), int(j)): _pixels(image)
        for image, i, j in zip(batch.images, batch.prompt, batch.image, strict=True)
        if i in prompts and j < SAMPLE_IMAGES
    }


def _pixels(image: Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] -> (h, w, 3) uint8."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def _checked_score(name: str, values: Any, images: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (images,):
        raise ValueError(
            f"extra score '{name}' must give one number per image, expected shape ({images},), "
            f"got {array.shape}"
        )
    return array
