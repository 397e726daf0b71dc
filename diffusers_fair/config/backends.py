"""The models that a recipe may name: for each role, its kinds and the provider of each kind.

A provider is written `package.module` or `package.module:name` and imported when it is used; it has
`load` and `needs` (see `backends.registry`). To add a kind, write a provider and add a line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kinds = Mapping[str, str]
"""How a recipe names a model, `kind` or `kind:ARGUMENT` -> provider."""

FACE_DETECTORS: Kinds = {
    "testbed": "diffusers_fair.testbed.backend:face_detector",
    "retinaface": "diffusers_fair.backends.retinaface",
    "none": "diffusers_fair.backends.no_faces",
}
CLIPS: Kinds = {
    "testbed": "diffusers_fair.testbed.backend:clip",
    "open_clip:MODEL/WEIGHTS": "diffusers_fair.backends.open_clip",
}
DINOS: Kinds = {
    "testbed": "diffusers_fair.testbed.backend:dino",
    "dinov2:MODEL": "diffusers_fair.backends.dinov2",
}
FACE_EMBEDDERS: Kinds = {
    "testbed": "diffusers_fair.testbed.backend:face_embedder",
    "timm:MODEL": "diffusers_fair.backends.timm",
}

REFERENCE_FACES: Kinds = {"testbed": "diffusers_fair.testbed.backend:reference_faces"}
"""Reference faces that ship with the face embedder of the same name."""
REFERENCE_FOLDER = "diffusers_fair.backends.reference_faces"
"""Provider of all others: they are the images of a folder."""

SHIPPED_BASES: Kinds = {"testbed": "diffusers_fair.testbed.backend:base"}
PRETRAINED_BASE = "diffusers_fair.backends.pipelines:pretrained_base"
"""Provider of all others: they are folders or Hub ids."""


@dataclass(frozen=True, kw_only=True)
class ClassifierKind:
    """A kind of classifier."""

    provider: str
    models: tuple[str, ...] = ()
    """The models that it knows; empty: any, but one must be named."""
    takes: Literal["classes", "phrases", None] = None
    """What a recipe gives for each class: labels of the model, or phrases that describe it."""
    sees_whole_images: bool = True
    """Whether it can classify attributes of the whole image, not of faces alone."""


CLASSIFIERS: Mapping[str, ClassifierKind] = {
    "testbed": ClassifierKind(
        provider="diffusers_fair.testbed.backend:classifier",
        models=("", "evaluation"),
        sees_whole_images=False,
    ),
    "transformers": ClassifierKind(
        provider="diffusers_fair.backends.image_classification", takes="classes"
    ),
    "zero_shot": ClassifierKind(provider="diffusers_fair.backends.zero_shot", takes="phrases"),
    "checkpoint": ClassifierKind(
        provider="diffusers_fair.backends.trained_classifier", takes="classes"
    ),
}
