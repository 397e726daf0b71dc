"""Fetches and trains what a recipe requires and this machine lacks, after saying what that takes.

Whatever is done stays done: a setup that was interrupted continues where it stopped.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_fair.backends.needs import Need
from diffusers_fair.backends.sources import (
    HUB_DATASET,
    ClassifierTraining,
    Download,
    HubDataset,
    Source,
)
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.doctor import examine
from diffusers_fair.training.classifier import (
    Settings,
    imagenet_weights,
    seconds_per_image,
    train_classifier,
)
from diffusers_fair.training.labelled_images import read_images

SETTINGS = Settings()
"""Settings of the classifiers, the defaults of `classifier train`."""


@dataclass(frozen=True)
class PlannedTraining:
    """A classifier to train."""

    training: ClassifierTraining
    images: int | None
    """Number of images, if it is known before they are downloaded."""
    seconds: float | None
    """Estimated duration on this machine; None if the number of images is not known."""


@dataclass(frozen=True)
class Plan:
    """What `setup` downloads and trains."""

    downloads: Mapping[Download, Sequence[str]]
    """Each download -> the recipe keys that need it."""
    trainings: Sequence[PlannedTraining]

    @property
    def size(self) -> int:
        """Return the number of bytes to download."""
        return sum(download.size for download in self.downloads)

    def check_disk(self) -> None:
        """Check that there is room for the downloads.

        Raises:
            ValueError: there is not.
        """
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
        free = shutil.disk_usage(disk).free
        if free < self.size:
            raise ValueError(
                f"setup downloads {self.size / 1e9:.1f} GB to the Hub's cache '{cache}', but there "
                f"are {free / 1e9:.1f} GB free: make room, or set HF_HOME to another disk's folder"
            )

    def run(self) -> None:
        """Download everything, then train the classifiers.

        Raises:
            ValueError: something cannot be downloaded; what was downloaded before is kept.
        """
        for download in self.downloads:
            download.fetch()
        for planned in self.trainings:
            training = planned.training
            images = read_images(training.data, training.label)
            train_classifier(images, training.folder, SETTINGS)


def plan(config: RunConfig) -> Plan:
    """Find out what a recipe still requires, and what it takes to get it.

    Asks the Hub for names, sizes and licences, and times the training of a classifier; downloads
    nothing.

    Raises:
        ValueError: something that is missing can be neither downloaded nor trained.
    """
    missing = {need: keys for need, keys in examine(config).items() if not need.available}
    _require_sources(list(missing))
    sources: dict[Source, list[str]] = {}
    trainings = []
    for need, keys in missing.items():
        if isinstance(need.source, ClassifierTraining):
            trainings.append(need.source)
            for source in _sources_of(need.source):
                sources.setdefault(source, []).extend(keys)
        elif need.source is not None:
            sources.setdefault(need.source, []).extend(keys)
    downloads = {source.download(): keys for source, keys in sources.items()}
    return Plan({d: keys for d, keys in downloads.items() if d.size}, _estimated(trainings))


def _require_sources(missing: Sequence[Need]) -> None:
    """Refuse what has to be provided by hand."""
    by_hand = [need for need in missing if need.source is None]
    if by_hand:
        what = "; ".join(f"{need.what} ({need.advice})" for need in by_hand)
        raise ValueError(
            f"setup cannot fetch {len(by_hand)} of the requirements: {what}; provide them, then "
            "run it again"
        )


def _sources_of(training: ClassifierTraining) -> list[Source]:
    """List the downloads that the training of a classifier needs."""
    if training.data.startswith(HUB_DATASET):
        dataset: list[Source] = [HubDataset.parse(training.data)]
    elif Path(training.data).exists():
        dataset = []
    else:
        raise ValueError(
            f"classifier '{training.folder}' should be trained on '{training.data}', which does "
            f"not exist: expected a folder, a parquet file or {HUB_DATASET}ORG/NAME in trained_on"
        )
    return [*dataset, imagenet_weights()] if SETTINGS.pretrained else dataset


def _estimated(trainings: Sequence[ClassifierTraining]) -> list[PlannedTraining]:
    """Estimate the duration of each training from a few updates on this machine."""
    if not trainings:
        return []
    per_image = seconds_per_image(SETTINGS) * SETTINGS.epochs * (1 - SETTINGS.held_out)
    planned = []
    for training in trainings:
        on_hub = training.data.startswith(HUB_DATASET)
        images = HubDataset.parse(training.data).images() if on_hub else None
        seconds = None if images is None else images * per_image
        planned.append(PlannedTraining(training, images, seconds))
    return planned
