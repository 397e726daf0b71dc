"""Evaluate existing images from a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.batches import Execution
from diffusers_fair.evaluation.checks import checked_attributes
from diffusers_fair.evaluation.evaluate import measure
from diffusers_fair.evaluation.image_folder import image_folder
from diffusers_fair.paths import expand
from diffusers_fair.reports.records import Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.vision.judges import Judges


def audit(
    folder: str | Path,
    attributes: Sequence[Attribute],
    *,
    judges: Judges,
    batch_size: int | None = None,
    label: str = "images",
    out: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Measure the bias and the CLIP-T of images in a folder with a subfolder for each prompt.

    Prompts may have different numbers of images. A prompt with fewer than two faces has no bias;
    the report lists such prompts.

    Args:
        folder: folder in the layout that `image_folder` describes.
        attributes: attributes to measure, as for `evaluate`.
        judges: the models that judge the images.
        batch_size: images judged together. Default: as for `evaluate`.
        label: name of the images in tables.
        out: folder that the report is saved to.
        model: names of the judging models, for the provenance.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the folder has no images, or an image cannot be read; or as `evaluate`.
    """
    images = image_folder(folder)
    counts = [len(files) for files in images.files]
    settings = Settings(
        prompts=images.prompts,
        attributes=checked_attributes(attributes, judges),
        images_per_prompt=max(counts),
        people=judges.people,
    )
    return measure(
        settings,
        counts,
        images.read,
        Execution(
            label,
            judges,
            batch_size,
            None if out is None else expand(out),
            progress,
            judges.device or torch.device("cpu"),
        ),
        model={"images": str(folder), "files": images.digest(), **(model or {})},
    )
