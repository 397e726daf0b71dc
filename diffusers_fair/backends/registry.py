"""Names in a recipe -> models. `config.backends` lists the kinds and their providers.

A provider is a module or an object with two functions; both take the text after `kind:`, if any:
`load` loads the model, and `needs` lists what must be available for that, without loading anything.
It is imported when it is used, so that no recipe needs the packages of models it does not name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffusers_fair.attributes import Attribute, People
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


def load_model(kinds: Kinds, name: str, device: Any = "cpu") -> Any:
    """Load the model that a recipe names.

    Args:
        kinds: of the model's role, as in `config.backends`.
        name: `kind` or `kind:ARGUMENT`.
        device: device that it computes on, in float32.

    Raises:
        ModuleNotFoundError: a package is missing; says how to install it.
        ValueError: the model cannot be loaded, or does not run on the device.
    """
    found, arguments = _find(kinds, name)
    return found.load(*arguments, device=device)


def model_needs(kinds: Kinds, name: str) -> "list[Need]":
    """List what `load_model` needs."""
    found, arguments = _find(kinds, name)
    return found.needs(*arguments)


def _find(kinds: Kinds, name: str) -> tuple[Any, list[str]]:
    """The provider of a model, and the arguments that its functions take."""
    kind, _, argument = name.partition(":")
    paths = {form.partition(":")[0]: path for form, path in kinds.items()}
    return provider(paths[kind]), [argument] if argument else []


# ---- base models ---------------------------------------------------------------------------------


def base(model: str) -> "Base":
    """Find out how a base model is loaded and used.

    Args:
        model: name of a shipped base, a folder or a Hub id.
    """
    return provider(SHIPPED_BASES.get(model, PRETRAINED_BASE))


def load_base(model: str, revision: str | None = None, dtype: str = "float32") -> Any:
    """Load a text-to-image pipeline.

    Args:
        model: name of a shipped base, a folder or a Hub id.
        revision: commit, tag or branch on the Hub.
        dtype: data type that it computes in: float32, bfloat16, float16, or auto: bfloat16 where
            that is fast, else float32.

    Raises:
        ValueError: the model does not exist, or cannot be reached.
    """
    return base(model).load(model, revision, dtype)


def usual_guidance(model: str) -> float:
    """The guidance scale that a base model is usually sampled with."""
    return base(model).usual_guidance


def untouched_set(model: str) -> str:
    """The prompt set of things and places without people that a base model can generate."""
    return base(model).untouched_set


def untouched_sets() -> tuple[str, ...]:
    """The prompt sets of things and places without people, of all base models."""
    paths = (PRETRAINED_BASE, *SHIPPED_BASES.values())
    return tuple(provider(path).untouched_set for path in paths)


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
        attributes: what to classify.
        device: device that they compute on, in float32: the pipeline's.
        people: which faces of an image count.

    Raises:
        ModuleNotFoundError: a package that a model needs is missing; says how to install it.
        ValueError: no classifier for an attribute, or one with other classes; a model that cannot
            be loaded, or does not run on the device.
    """
    from diffusers_fair.vision.judges import Judges

    @cache
    def load_clip(name: str) -> "ImageTextEncoder":
        """Load an encoder once, also if several judges use it."""
        return load_model(CLIPS, name, device)

    return Judges(
        face_detector=load_model(FACE_DETECTORS, models.face_detector, device),
        classifiers={
            a.name: _load_classifier(models.classifier(a), a, load_clip, device) for a in attributes
        },
        clip=load_clip(models.clip),
        dino=load_model(DINOS, models.dino, device),
        extra=_extra_scores(models),
        people=people,
    )


def classifier_needs(section: "ClassifierSection", attribute: Attribute) -> "list[Need]":
    """List what a classifier needs, and whether it knows the attribute's classes."""
    found = provider(CLASSIFIERS[section.kind].provider)
    needs = found.needs(section.model)
    if hasattr(found, "classes_need") and needs[-1].available:
        return [*needs, found.classes_need(section.model, section.classes, attribute)]
    return needs


def _load_classifier(
    section: "ClassifierSection",
    attribute: Attribute,
    load_clip: "Callable[[str], ImageTextEncoder]",
    device: Any,
) -> "Classifier":
    """Load the classifier of an attribute, with the attribute's classes in any order."""
    kind = CLASSIFIERS[section.kind]
    load = provider(kind.provider).load
    if kind.takes == "classes":
        classifier = load(section.model, section.classes, device=device)
    elif kind.takes == "phrases":
        classifier = load(section.model, section.phrases, load_clip)
    else:
        classifier = load(section.model, attribute.name, device=device)
    if set(classifier.classes) != set(attribute.classes):
        raise ValueError(
            f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
            f"classifier knows {list(classifier.classes)}: say in the classifier's classes which "
            "of its labels make which class"
        )
    return classifier


def _extra_scores(models: "JudgesSection") -> dict[str, Any]:
    """Scores that come with a classifier."""
    scores: dict[str, Any] = {}
    for section in models.classifiers.values():
        found = provider(CLASSIFIERS[section.kind].provider)
        if hasattr(found, "extra_scores"):
            scores |= found.extra_scores(section.model)
    return scores


# ---- reference faces -----------------------------------------------------------------------------


def load_reference_faces(
    models: "ModelsSection", detector: "FaceDetector", device: Any = "cpu"
) -> "ReferenceFaces":
    """Load the face embedder and the reference faces, which only the face realism loss needs.

    Args:
        models: a recipe's `models`.
        detector: training's face detector, which finds the faces in the images of a folder.
        device: device that both compute on, in float32: the pipeline's.

    Raises:
        ModuleNotFoundError: a package that the embedder needs is missing; says how to install it.
        ValueError: an embedder that cannot be loaded, or does not run on the device; a folder
            without faces.
    """
    from diffusers_fair.vision.reference_faces import ReferenceFaces

    embedder = load_model(FACE_EMBEDDERS, models.face_embedder, device)
    if models.face_bank in REFERENCE_FACES:
        return ReferenceFaces(embedder, load_model(REFERENCE_FACES, models.face_bank, device))
    load = provider(REFERENCE_FOLDER).load
    return ReferenceFaces(embedder, load(models.face_bank, detector, embedder, device))


def reference_faces_needs(face_bank: str) -> "list[Need]":
    """List what the reference faces need."""
    if face_bank in REFERENCE_FACES:
        return model_needs(REFERENCE_FACES, face_bank)
    return provider(REFERENCE_FOLDER).needs(face_bank)
