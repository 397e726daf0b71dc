"""Loads the models that a recipe names. `config.backends` lists their kinds and providers.

A provider is a module or an object with two functions, which take the text after `kind:`, if any:
`load` loads the model, and `needs` lists its requirements without loading anything. A provider is
imported when it is used, so a recipe needs only the packages of the models that it names.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from os.path import expanduser
from typing import TYPE_CHECKING, Any

import torch

from diffusers_fair.attributes import Attribute, People
from diffusers_fair.backends.sources import ClassifierTraining
from diffusers_fair.config.backends import (
    CLASSIFIERS,
    CLIPS,
    DINOS,
    FACE_DETECTORS,
    FACE_EMBEDDERS,
    PRETRAINED_BASE,
    REFERENCE_FACES,
    REFERENCE_FOLDER,
    SHIPPED_BASES,
    Kinds,
)
from diffusers_fair.devices import choose_device, choose_dtype
from diffusers_fair.families import family_of
from diffusers_fair.families.base import Usual
from diffusers_fair.paths import expand

if TYPE_CHECKING:
    from diffusers_fair.backends.needs import Need
    from diffusers_fair.backends.pipelines import Base
    from diffusers_fair.config.models import ClassifierSection, JudgesSection, ModelsSection
    from diffusers_fair.vision.classifiers import Classifier
    from diffusers_fair.vision.encoders import ImageTextEncoder
    from diffusers_fair.vision.faces import FaceDetector
    from diffusers_fair.vision.judges import Judges
    from diffusers_fair.vision.reference_faces import ReferenceFaces


def provider(path: str) -> Any:
    """Import a provider: `package.module` or `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


def _load_model(kinds: Kinds, name: str, device: Any = "cpu") -> Any:
    """Load the model that a recipe names.

    Args:
        kinds: kinds of models for one role, as in `config.backends`.
        name: `kind` or `kind:ARGUMENT`.
        device: device that it computes on, in float32.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
        ValueError: the model cannot be loaded, or does not run on the device.
    """
    found, arguments = _find(kinds, name)
    return found.load(*arguments, device=device)


def model_needs(kinds: Kinds, name: str) -> "list[Need]":
    """List the requirements of `_load_model`."""
    found, arguments = _find(kinds, name)
    return found.needs(*arguments)


def _find(kinds: Kinds, name: str) -> tuple[Any, list[str]]:
    """Find the provider of a model, and the arguments of its functions."""
    kind, _, argument = name.partition(":")
    paths = {form.partition(":")[0]: path for form, path in kinds.items()}
    return provider(paths[kind]), [expanduser(argument)] if argument else []


# ---- base models ---------------------------------------------------------------------------------


def base(model: str) -> "Base":
    """Look up how to load and use a base model.

    Args:
        model: name of a shipped base, a folder, a file or a Hub id.
    """
    return provider(SHIPPED_BASES.get(model, PRETRAINED_BASE))


def load_base(
    model: str,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> Any:
    """Load a text-to-image pipeline.

    Args:
        model: name of a shipped base, a folder, a single `.safetensors` file or a Hub id.
        revision: commit, tag or branch on the Hub.
        dtype: float32, bfloat16, float16, or auto: bfloat16 if the device is fast in it, else
            float32.
        device: device of the pipeline.

    Raises:
        ValueError: the model does not exist, or cannot be reached; or as `check_revision`.
    """
    check_revision(model, revision)
    device = torch.device(device)
    pipe = base(model).load(expanduser(model), revision, choose_dtype(dtype, device))
    return pipe.to(device)


def check_revision(model: str, revision: str | None) -> None:
    """Refuse a revision of what has none: a shipped base, a folder or a file.

    Raises:
        ValueError: the model is no Hub id, but a revision is given.
    """
    if revision is not None and (model in SHIPPED_BASES or expand(model).exists()):
        raise ValueError(
            f"revision '{revision}' is for a repository on the Hub, but '{model}' is none: leave "
            "the revision out, or name a Hub id"
        )


def choose_base_device(model: str, device: str = "auto") -> torch.device:
    """Choose the device of a base model: `auto` is its usual device, as `choose_device` finds it.

    Raises:
        ValueError: an unknown device, or one that is not available.
    """
    return choose_device(base(model).usual_device if device == "auto" else device)


def usual_sampling(model: str, pipe: Any) -> Usual:
    """Return the usual guidance scale and steps of a base model, given its pipeline."""
    usual = base(model).usual_sampling
    return family_of(pipe).usual(pipe) if usual is None else usual


def untouched_set(model: str) -> str:
    """Return the prompt set of things and places without people that a base model can generate."""
    return base(model).untouched_set


def untouched_sets() -> tuple[str, ...]:
    """Return the prompt sets of things and places without people of all base models."""
    paths = (PRETRAINED_BASE, *SHIPPED_BASES.values())
    return tuple(dict.fromkeys(provider(path).untouched_set for path in paths))


# ---- judges --------------------------------------------------------------------------------------


def load_judges(
    models: "JudgesSection",
    attributes: Sequence[Attribute],
    device: Any = "cpu",
    people: People = "largest",
) -> "Judges":
    """Load the models that judge images, in training or in evaluation.

    Args:
        models: a recipe's `models` or `evaluation.models`.
        attributes: attributes to classify.
        device: device that they compute on, in float32. Images are moved to it.
        people: which faces of an image count.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
        ValueError: an attribute has no classifier, or one with other classes; or a model cannot be
            loaded, or does not run on the device.
    """
    from diffusers_fair.vision.judges import Judges

    @cache
    def load_clip(name: str) -> "ImageTextEncoder":
        """Load an encoder, but only once if several judges use it."""
        return _load_model(CLIPS, name, device)

    return Judges(
        face_detector=_load_model(FACE_DETECTORS, models.face_detector, device),
        classifiers={
            a.name: _load_classifier(models.classifier(a), a, load_clip, device) for a in attributes
        },
        clip=load_clip(models.clip),
        dino=_load_model(DINOS, models.dino, device),
        extra=_extra_scores(models, device),
        people=people,
        device=torch.device(device),
    )


def classifier_needs(section: "ClassifierSection", attribute: Attribute) -> "list[Need]":
    """List the requirements of a classifier, including that it knows the attribute's classes."""
    found = provider(CLASSIFIERS[section.kind].provider)
    model = expanduser(section.model)
    needs = found.needs(model)
    if section.trained_on and not needs[-1].available:
        training = ClassifierTraining(model, section.trained_on, section.label or attribute.name)
        return [*needs[:-1], *found.trainable(needs[-1], training)]
    if hasattr(found, "classes_need") and needs[-1].available:
        return [*needs, found.classes_need(model, section.classes, attribute)]
    return needs


def _load_classifier(
    section: "ClassifierSection",
    attribute: Attribute,
    load_clip: "Callable[[str], ImageTextEncoder]",
    device: Any,
) -> "Classifier":
    """Load the classifier of an attribute, and check its classes."""
    kind = CLASSIFIERS[section.kind]
    load, model = provider(kind.provider).load, expanduser(section.model)
    if kind.takes == "classes":
        classifier = load(model, section.classes, device=device)
    elif kind.takes == "phrases":
        classifier = load(model, section.phrases, load_clip)
    else:
        classifier = load(model, attribute.name, device=device)
    if set(classifier.classes) != set(attribute.classes):
        raise ValueError(
            f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
            f"classifier knows {list(classifier.classes)}: map its labels to the classes with the "
            "classifier's key classes"
        )
    return classifier


def _extra_scores(models: "JudgesSection", device: Any) -> dict[str, Any]:
    """Collect the scores that come with the classifiers."""
    scores: dict[str, Any] = {}
    for section in models.classifiers.values():
        found = provider(CLASSIFIERS[section.kind].provider)
        if hasattr(found, "extra_scores"):
            scores |= found.extra_scores(section.model, device)
    return scores


# ---- reference faces -----------------------------------------------------------------------------


def load_reference_faces(
    models: "ModelsSection", detector: "FaceDetector", device: Any = "cpu"
) -> "ReferenceFaces":
    """Load the face embedder and the reference faces for the face realism loss.

    Args:
        models: a recipe's `models`.
        detector: face detector of the training, for reference faces from a folder of images.
        device: device that both compute on, in float32; that of the pipeline.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
        ValueError: the embedder cannot be loaded, or does not run on the device; or the folder has
            no faces.
    """
    from diffusers_fair.vision.reference_faces import ReferenceFaces

    embedder = _load_model(FACE_EMBEDDERS, models.face_embedder, device)
    if models.face_bank in REFERENCE_FACES:
        return ReferenceFaces(embedder, _load_model(REFERENCE_FACES, models.face_bank, device))
    load = provider(REFERENCE_FOLDER).load
    return ReferenceFaces(embedder, load(models.face_bank, detector, embedder, device))


def reference_faces_needs(face_bank: str) -> "list[Need]":
    """List the requirements of the reference faces."""
    if face_bank in REFERENCE_FACES:
        return model_needs(REFERENCE_FACES, face_bank)
    return provider(REFERENCE_FOLDER).needs(face_bank)
