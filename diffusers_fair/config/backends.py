"""The models that a recipe may name: for each role, its kinds and the provider of each kind.

A provider is written `package.module` or `package.module:name` and imported when it is used; it has
`load` and `needs` (see `backends.registry`). To add a kind, write a provider and add a line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kinds = Mapping[str, str]
"""Name of a model in a recipe, `kind` or `kind:ARGUMENT` -> provider."""

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
"""Provider of all other reference faces, which are the images of a folder."""

SHIPPED_BASES: Kinds = {
    "testbed": "diffusers_fair.testbed.backend:base",
    "testbed-flux": "diffusers_fair.testbed.backend:flux_base",
}
PRETRAINED_BASE = "diffusers_fair.backends.pipelines:pretrained_base"
"""Provider of all other base models, which are folders or Hub ids."""


@dataclass(frozen=True, kw_only=True)
class ClassifierKind:
    """A kind of classifier."""

    provider: str
    models: tuple[str, ...] = ()
    """Possible models; empty: any model, which must be named."""
    takes: Literal["classes", "phrases", None] = None
    """Key that a recipe sets for each class: labels of the model, or phrases that describe it."""
    trained_here: bool = False
    """Whether `classifier train` makes it."""
    sees_whole_images: bool = True
    """Whether it can classify whole images, not only faces."""


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
        provider="diffusers_fair.backends.trained_classifier", takes="classes", trained_here=True
    ),
}
