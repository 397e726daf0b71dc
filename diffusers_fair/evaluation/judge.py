"""Judge a batch of images, and record what the judges perceive."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.generate import ImageBatch
from diffusers_fair.evaluation.journal import BatchRecords
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
from diffusers_fair.vision.classifiers import classifier_input
from diffusers_fair.vision.faces import Faces
from diffusers_fair.vision.images import to_arrays, to_bytes
from diffusers_fair.vision.judges import Judges

_THUMBNAIL_SIDE = 64  # pixels


@torch.no_grad()
def judge_batch(
    batch: ImageBatch,
    settings: Settings,
    judges: Judges,
    texts: np.ndarray,
    reference: Records | None,
    sampled_prompts: int = SAMPLE_PROMPTS,
) -> BatchRecords:
    """Judge a batch of images.

    Args:
        batch: the images.
        settings: settings of the evaluation.
        judges: the models that judge the images.
        texts: CLIP features (P, d) of the prompts.
        reference: the base model's records of the same noise.
        sampled_prompts: number of prompts whose first images are kept as samples.

    Raises:
        ValueError: a judge returns non-finite values, or not one score per image.
    """
    batch = replace(batch, images=judges.on_device(batch.images))
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
        **_faces(faces, _probabilities(batch.images, faces, settings.attributes, judges), settings),
        scores={name: np.round(values.astype(float), 6) for name, values in scores.items()},
        features=features,
    )
    return BatchRecords(
        records, _samples(batch, sample_prompts(len(settings.prompts), sampled_prompts))
    )


@torch.no_grad()
def judge_group_batch(
    batch: ImageBatch,
    group: PromptGroup,
    settings: Settings,
    judges: Judges,
    texts: np.ndarray,
    reference: Records | None,
) -> BatchRecords:
    """Judge a batch of images of control prompts, as `judge_batch` does for neutral prompts.

    Adds the score "obeyed" and, for untouched prompts with a reference, the score "pixels".
    """
    judges = replace(judges, extra={})
    judged = judge_batch(batch, settings, judges, texts, reference, GROUP_SAMPLES)
    records = with_obeyed(judged.records, group.prompts, settings.attributes)
    if group.name == UNTOUCHED:
        small = thumbnails(batch.images)
        records = replace(records, features={**records.features, THUMBNAIL: small})
        if reference is not None:
            rows = batch.prompt * settings.images_per_prompt + batch.image  # (n,)
            change = np.round(pixel_change(small, reference.features[THUMBNAIL][rows]), 6)
            records = replace(records, scores={**records.scores, PIXELS: change})
    return replace(judged, records=records)


def thumbnails(images: Tensor) -> np.ndarray:
    """Shrink images (n, 3, h, w) in [-1, 1] of any size to (n, 3 * 64 * 64) in 0 to 255."""
    small = torch.nn.functional.interpolate(
        images.float(), (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), mode="area"
    )
    return to_bytes(small).flatten(1).cpu().numpy()


def _faces(
    faces: Faces, probabilities: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, Any]:
    """Build the fields of `Records` on faces: the largest and, if all count, the others."""
    has_face, boxes = faces.is_face.cpu().numpy(), np.round(faces.boxes.cpu().double().numpy(), 2)
    if faces.image is None:
        return {"found": has_face, "boxes": boxes, "probabilities": probabilities}
    image = faces.image.cpu().numpy()
    first = np.flatnonzero(np.diff(image, prepend=-1))  # (n,) row of each image's largest face
    rank = np.arange(len(image)) - first[image]  # (rows,) among the faces of the image
    is_other = rank > 0

    def others(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(first), rank.max(), *values.shape[1:]), values.dtype)
        padded[image[is_other], rank[is_other] - 1] = values[is_other]
        return padded

    of_faces = {a.name for a in settings.attributes if a.of_faces}
    return {
        "found": has_face[first],
        "boxes": boxes[first],
        "probabilities": {k: p[first] if k in of_faces else p for k, p in probabilities.items()},
        "others_found": others(has_face),
        "others_boxes": others(boxes),
        "others_probabilities": {k: others(p) for k, p in probabilities.items() if k in of_faces},
    }


def _probabilities(
    images: Tensor, faces: Faces, attributes: Sequence[Attribute], judges: Judges
) -> dict[str, np.ndarray]:
    """Map attributes to rounded probabilities, with the classes in the attribute's order.

    Shape (rows, classes) for attributes of faces, with zeros where a row has no face; otherwise
    (n, classes).
    """
    has_face, result = faces.is_face.cpu().numpy(), {}
    with_face, found = images[faces.image_index[faces.is_face]], faces[faces.is_face]
    views: dict[tuple[bool, int], Tensor] = {}  # classifiers share them
    for a in attributes:
        classifier, rows = judges.classifiers[a.name], has_face if a.of_faces else slice(None)
        result[a.name] = np.zeros((len(has_face if a.of_faces else images), len(a.classes)))
        if a.of_faces and not len(with_face):
            continue
        key = a.of_faces, classifier.size
        if key not in views:
            views[key] = classifier_input(
                a, with_face if a.of_faces else images, found, classifier.size
            )
        p = classifier(views[key]).cpu().double().numpy()  # (faces or n, classes)
        if not np.isfinite(p).all():
            raise ValueError(
                f"the classifier of '{a.name}' returned non-finite probabilities: "
                "check its weights and precision"
            )
        order = [classifier.classes.index(name) for name in a.classes]
        result[a.name][rows] = np.round(p[:, order], 6)
    return result


def _samples(batch: ImageBatch, prompts: Sequence[int]) -> dict[tuple[int, int], np.ndarray]:
    """Pick the first images of the sampled prompts, (h, w, 3) uint8."""
    return {
        (int(i), int(j)): to_arrays(image)
        for image, i, j in zip(batch.images, batch.prompt, batch.image, strict=True)
        if i in prompts and j < SAMPLE_IMAGES
    }


def _checked_score(name: str, values: Any, images: int) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (images,):
        raise ValueError(
            f"extra score '{name}' must return one number per image: expected shape ({images},), "
            f"got {array.shape}"
        )
    return array
