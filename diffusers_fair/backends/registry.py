"""Names in a recipe -> models. Each is imported when it is asked for, not before.

One file for each kind of model; `needs` in it says what must be there, without loading anything.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from diffusers_fair import testbed
from diffusers_fair.attributes import Attribute, People
from diffusers_fair.backends.pipelines import (
    UNTOUCHED_SETS,
    load_base,
    untouched_set,
    usual_guidance,
)

if TYPE_CHECKING:
    from diffusers_fair.backends.open_clip import OpenClipEncoder
    from diffusers_fair.config.models import ClassifierSection, JudgesSection, ModelsSection
    from diffusers_fair.vision.classifiers import Classifier
    from diffusers_fair.vision.encoders import ImageEncoder, ImageTextEncoder, NetworkEncoder
    from diffusers_fair.vision.faces import FaceDetector
    from diffusers_fair.vision.judges import Judges
    from diffusers_fair.vision.reference_faces import ReferenceFaces

__all__ = [
    "UNTOUCHED_SETS",
    "load_base",
    "load_evaluation_judges",
    "load_judges",
    "load_reference_faces",
    "untouched_set",
    "usual_guidance",
]


def load_judges(
    models: "JudgesSection",
    attributes: Sequence[Attribute],
    device: Any = "cpu",
    people: People = "largest",
) -> "Judges":
    """Load what looks at the images, in training or in evaluation.

    Args:
        models: a recipe's `models` or `evaluation.models`.
        attributes: what to classify.
        device: where they compute, in float32: the pipeline's.
        people: which faces of an image count.

    Raises:
        ModuleNotFoundError: a package that a model needs is missing; says how to install it.
        ValueError: no classifier for an attribute, or one with other classes; a model that cannot
            be loaded; the testbed's models, which stay on the CPU, on another device.
    """
    from diffusers_fair.vision.judges import Judges

    @cache
    def open_clip(name: str) -> "OpenClipEncoder":
        """Once, though several judges may be made of it."""
        from diffusers_fair.backends.open_clip import load_encoder

        return load_encoder(name, device)

    return Judges(
        face_detector=_face_detector(models.face_detector, device),
        classifiers={
            a.name: _classifier(models.classifier(a), a, open_clip, device) for a in attributes
        },
        clip=_clip(models.clip, open_clip, device),
        dino=_dino(models.dino, device),
        extra=_extra(models),
        people=people,
    )


def load_evaluation_judges(attributes: Sequence[str]) -> "Judges":
    """Load the testbed's judges of evaluation, which training never saw.

    Args:
        attributes: names of the testbed's attributes to classify.

    Raises:
        ValueError: the testbed has no attribute of that name.
    """
    from diffusers_fair.config.models import EvaluationModelsSection
    from diffusers_fair.testbed import world

    for name in attributes:
        if name not in world.ATTRIBUTES:
            raise ValueError(f"the testbed has {', '.join(world.ATTRIBUTES)}, no '{name}'")
    return load_judges(EvaluationModelsSection(), [world.ATTRIBUTES[name] for name in attributes])


def load_reference_faces(
    models: "ModelsSection", detector: "FaceDetector", device: Any = "cpu"
) -> "ReferenceFaces":
    """Load the face embedder and the reference faces, which only the face realism loss needs.

    Args:
        models: a recipe's `models`.
        detector: training's face detector, which finds the faces in the images of a folder.
        device: where it all computes, in float32: the pipeline's.

    Raises:
        ModuleNotFoundError: a package that the embedder needs is missing; says how to install it.
        ValueError: an embedder that cannot be loaded; a folder without faces; the testbed's
            embedder on another device than the CPU.
    """
    from diffusers_fair.vision.reference_faces import ReferenceFaces

    embedder = _face_embedder(models.face_embedder, device)
    if models.face_bank == testbed.NAME:
        return ReferenceFaces(embedder, _testbed(device).face_bank())
    from diffusers_fair.backends import reference_faces

    faces = reference_faces.load_reference_faces(models.face_bank, detector, embedder, device)
    return ReferenceFaces(embedder, faces)


def _face_embedder(name: str, device: Any) -> "NetworkEncoder":
    kind, _, what = name.partition(":")
    if kind == "timm":
        from diffusers_fair.backends.timm import load_embedder

        return load_embedder(what, device)
    return _testbed(device).face_embedder()


def _face_detector(name: str, device: Any) -> "FaceDetector":
    if name == "none":
        from diffusers_fair.vision.faces import no_faces

        return no_faces
    if name == "retinaface":
        from diffusers_fair.backends.retinaface import load_detector

        return load_detector(device)
    return _testbed(device).face_detector()


def _clip(
    name: str, open_clip: "Callable[[str], OpenClipEncoder]", device: Any
) -> "ImageTextEncoder":
    kind, _, what = name.partition(":")
    return open_clip(what) if kind == "open_clip" else _testbed(device).clip()


def _dino(name: str, device: Any) -> "ImageEncoder":
    kind, _, what = name.partition(":")
    if kind == "dinov2":
        from diffusers_fair.backends.dinov2 import load_encoder

        return load_encoder(what, device)
    return _testbed(device).dino()


def _classifier(
    section: "ClassifierSection",
    attribute: Attribute,
    open_clip: "Callable[[str], OpenClipEncoder]",
    device: Any,
) -> "Classifier":
    """The classifier of an attribute, of the attribute's classes in any order."""
    match section.kind:
        case "transformers":
            from diffusers_fair.backends import image_classification

            found = image_classification.load_classifier(section.model, section.classes, device)
        case "zero_shot":
            from diffusers_fair.backends.zero_shot import zero_shot

            found = zero_shot(open_clip(section.model), section.phrases)
        case "checkpoint":
            from diffusers_fair.backends import trained_classifier

            found = trained_classifier.load_classifier(section.model, section.classes, device)
        case _:
            judges = _testbed(device)
            found = judges.classifier(attribute.name, evaluation=section.model == "evaluation")
    if set(found.classes) != set(attribute.classes):
        raise ValueError(
            f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
            f"classifier knows {list(found.classes)}: say in the classifier's classes which of its "
            "labels make which class"
        )
    return found


def _extra(models: "JudgesSection") -> dict[str, Any]:
    """Beside the testbed's evaluation classifiers, whether the context is that of the prompt."""
    kinds = {(section.kind, section.model) for section in models.classifiers.values()}
    if ("testbed", "evaluation") not in kinds:
        return {}
    from diffusers_fair.testbed import judges, world
    from diffusers_fair.vision.judges import recognition

    return {"context": recognition(judges.family_classifier(), world.family_in)}


def _testbed(device: Any) -> Any:
    """The testbed's judges."""
    import torch

    if torch.device(device).type != "cpu":
        raise ValueError(
            f"the models of the {testbed.NAME} compute on the CPU, and the pipeline is on "
            f"'{device}': move it to the CPU, or name other models in the recipe"
        )
    from diffusers_fair.testbed import judges

    return judges
