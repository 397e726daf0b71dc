"""What a recipe needs, what is there and what is not: looked up before hours are spent.

Nothing is downloaded and no model is loaded.
"""

from collections.abc import Sequence

from diffusers_fair import testbed
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends import (
    dinov2,
    image_classification,
    pipelines,
    reference_faces,
    retinaface,
    trained_classifier,
)
from diffusers_fair.backends import open_clip as clips
from diffusers_fair.backends import timm as embedders
from diffusers_fair.backends.labels import group
from diffusers_fair.backends.needs import Need, package, pretrained
from diffusers_fair.config.models import ClassifierSection, JudgesSection, ModelsSection
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.prompts import prompt_set
from diffusers_fair.training.kept_prompts import kept_prompts

Parts = dict[str, list[Need]]
"""Part of the recipe, as its key -> what it needs."""


def examine(config: RunConfig) -> dict[Need, list[str]]:
    """Look up everything that a recipe names.

    Returns:
        What is needed, each thing once -> the parts of the recipe that need it.
    """
    attributes = [section.attribute() for section in config.attributes]
    packages = ["accelerate", "scipy", "rich"]
    if config.tracker != "none":
        packages.append(config.tracker)
    splits = (config.prompts.train, config.prompts.validation, config.evaluation.split)
    parts: Parts = {
        "training": [package(name) for name in packages],
        "base": pipelines.needs(config.base.model, config.base.revision),
        "adapter.init_from": [pretrained(name)] if (name := config.adapter.init_from) else [],
        "prompts": [_prompts(name, splits) for name in config.prompts.sets],
        "prompts.keep": [_kept_prompts(config)] if config.prompts.keep else [],
        **_judges(config.models, attributes, "models"),
        **(_real_faces(config.models) if config.losses.face else {}),
        **_judges(config.evaluation.models, attributes, "evaluation.models"),
    }
    found: dict[Need, list[str]] = {}
    for part, needs in parts.items():
        for need in needs:
            found.setdefault(need, []).append(part)
    return found


def _real_faces(models: ModelsSection) -> Parts:
    """What the face realism loss needs."""
    embedder, folder = models.face_embedder.partition(":")[2], models.face_bank
    return {
        "models.face_embedder": embedders.needs(embedder) if embedder else [],
        "models.face_bank": [] if folder == testbed.NAME else reference_faces.needs(folder),
    }


def _judges(models: JudgesSection, attributes: Sequence[Attribute], key: str) -> Parts:
    """What the models that look at the images need."""
    detector = retinaface.needs() if models.face_detector == "retinaface" else []
    clip, dino = (name.partition(":")[2] for name in (models.clip, models.dino))
    return {
        f"{key}.face_detector": detector,
        **{f"{key}.classifiers.{a.name}": _classifier(models.classifier(a), a) for a in attributes},
        f"{key}.clip": clips.needs(clip) if clip else [],
        f"{key}.dino": dinov2.needs(dino) if dino else [],
    }


def _classifier(section: ClassifierSection, attribute: Attribute) -> list[Need]:
    """What a classifier needs, and whether it knows the attribute's classes."""
    match section.kind:
        case "transformers":
            return image_classification.needs(section.model)
        case "zero_shot":
            return clips.needs(section.model)
        case "checkpoint":
            needs = trained_classifier.needs(section.model)
            return [*needs, _classes(section, attribute)] if needs[-1].there else needs
    return []


def _classes(section: ClassifierSection, attribute: Attribute) -> Need:
    """Whether the labels of a checkpoint make the attribute's classes."""
    what = f"classes of '{section.model}'"
    try:
        known = set(group(trained_classifier.read_facts(section.model)["classes"], section.classes))
    except (OSError, ValueError) as error:
        return Need(what, False, str(error))
    advice = f"expected {list(attribute.classes)}, got {sorted(known)}: map them with classes"
    return Need(what, known == set(attribute.classes), advice)


def _prompts(name: str, splits: Sequence[str]) -> Need:
    """A prompt list, and its splits."""
    try:
        known = prompt_set(name)
        for split in splits:
            known.prompts(split)
    except ValueError as error:
        return Need(name, False, str(error))
    return Need(name, True)


def _kept_prompts(config: RunConfig) -> Need:
    """The prompt sets that the adapter has to leave alone."""
    try:
        kept_prompts(config)
    except ValueError as error:
        return Need("kept prompts", False, str(error))
    return Need("kept prompts", True)
