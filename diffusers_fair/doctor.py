"""Check that everything that a recipe requires is available, before hours are spent on training.

Downloads nothing and loads no model.
"""

from collections.abc import Sequence

from diffusers_fair.adapters.trainable import check_component_names
from diffusers_fair.attributes import Attribute
from diffusers_fair.backends import registry
from diffusers_fair.backends.needs import Need, file, package, pretrained
from diffusers_fair.config.backends import CLIPS, DINOS, FACE_DETECTORS, FACE_EMBEDDERS
from diffusers_fair.config.models import JudgesSection, ModelsSection
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.paths import expand
from diffusers_fair.prompts import prompt_set
from diffusers_fair.training.kept_prompts import kept_prompts

Parts = dict[str, list[Need]]
"""Recipe key -> what its value requires."""


def examine(config: RunConfig) -> dict[Need, list[str]]:
    """Check everything that a recipe names.

    Returns:
        Each requirement -> the recipe keys that need it.
    """
    attributes = [section.attribute() for section in config.attributes]
    tracker = config.tracker
    splits = (config.prompts.train, config.prompts.validation, config.evaluation.split)
    parts: Parts = {
        "training": [package(name) for name in ("accelerate", "scipy", "rich")],
        "tracker": [package(tracker, f"pip install {tracker}")] if tracker != "none" else [],
        "train.device": [_device(config)] if config.train.device != "auto" else [],
        "base": registry.base(config.base.model).needs(config.base.model, config.base.revision),
        "adapter.components": _components(config),
        "adapter.init_from": [_start(name)] if (name := config.adapter.init_from) else [],
        "prompts": [_prompts(name, splits) for name in config.prompts.sets],
        "prompts.keep": [_kept_prompts(config)] if config.prompts.keep else [],
        **_judges(config.models, attributes, "models"),
        **(_reference_faces(config.models) if config.losses.face else {}),
        **_judges(config.evaluation.models, attributes, "evaluation.models"),
    }
    found: dict[Need, list[str]] = {}
    for part, needs in parts.items():
        for need in needs:
            found.setdefault(need, []).append(part)
    return found


def _components(config: RunConfig) -> list[Need]:
    """Check that the base model has the adapter's components, if the base is available."""
    model, revision = config.base.model, config.base.revision
    family = registry.base(model).family(model, revision)
    if family is None:
        return []
    what = f"components {', '.join(config.adapter.components)}"
    try:
        check_component_names(config.adapter.components, family)
    except ValueError as error:
        return [Need(what, False, str(error))]
    return [Need(what, True)]


def _device(config: RunConfig) -> Need:
    """Check that the device is available."""
    name = config.train.device
    try:
        registry.choose_base_device(config.base.model, name)
    except ValueError as error:
        return Need(f"device {name}", False, str(error))
    return Need(f"device {name}", True)


def notes(config: RunConfig) -> list[str]:
    """Describe what a recipe leaves out, so that less is required."""
    if config.losses.face or not any(a.attribute().of_faces for a in config.attributes):
        return []
    return [
        "off      face realism loss (losses.face is 0): models.face_embedder and models.face_bank "
        "are not needed"
    ]


def _reference_faces(models: ModelsSection) -> Parts:
    """List the requirements of the face realism loss."""
    return {
        "models.face_embedder": registry.model_needs(FACE_EMBEDDERS, models.face_embedder),
        "models.face_bank": registry.reference_faces_needs(models.face_bank),
    }


def _judges(models: JudgesSection, attributes: Sequence[Attribute], key: str) -> Parts:
    """List the requirements of the models that judge images."""
    return {
        f"{key}.face_detector": registry.model_needs(FACE_DETECTORS, models.face_detector),
        **{
            f"{key}.classifiers.{a.name}": registry.classifier_needs(models.classifier(a), a)
            for a in attributes
        },
        f"{key}.clip": registry.model_needs(CLIPS, models.clip),
        f"{key}.dino": registry.model_needs(DINOS, models.dino),
    }


def _start(name: str) -> Need:
    """Check the adapter or the LoRA file that training starts from."""
    path = expand(name)
    return file(path, "") if path.is_file() else pretrained(name)


def _prompts(name: str, splits: Sequence[str]) -> Need:
    """Check a prompt set and its splits."""
    try:
        known = prompt_set(name)
        for split in splits:
            known.prompts(split)
    except ValueError as error:
        return Need(name, False, str(error))
    return Need(name, True)


def _kept_prompts(config: RunConfig) -> Need:
    """Check the prompts whose images must stay those of the base model."""
    try:
        kept_prompts(config)
    except ValueError as error:
        return Need("kept prompts", False, str(error))
    return Need("kept prompts", True)
