"""Recipe sections for the models that judge images: face detector, classifiers, encoders."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from diffusers_fair.attributes import Attribute
from diffusers_fair.config.backends import (
    CLASSIFIERS,
    CLIPS,
    DINOS,
    FACE_DETECTORS,
    FACE_EMBEDDERS,
    REFERENCE_FACES,
    Kinds,
)
from diffusers_fair.config.section import Section


def _one_of(forms: Kinds) -> AfterValidator:
    """Check that a model's name has one of these forms: `kind`, or `kind:ARGUMENT`."""
    takes_value = {form.partition(":")[0]: ":" in form for form in forms}

    def check(name: str) -> str:
        kind, _, value = name.partition(":")
        if takes_value.get(kind) is not bool(value):
            raise ValueError(f"expected {' or '.join(map(repr, forms))}, got {name!r}")
        return name

    return AfterValidator(check)


def _known_classifier(kind: str) -> str:
    if kind not in CLASSIFIERS:
        *others, last = map(repr, CLASSIFIERS)
        raise ValueError(f"expected {', '.join(others)} or {last}, got {kind!r}")
    return kind


_FaceDetectorName = Annotated[str, _one_of(FACE_DETECTORS)]
_ClipName = Annotated[str, _one_of(CLIPS)]
_DinoName = Annotated[str, _one_of(DINOS)]
_FaceEmbedderName = Annotated[str, _one_of(FACE_EMBEDDERS)]
_OnlyIfGiven = Annotated[str, Field(exclude_if=lambda value: not value)]  # as older recipes
_ClassifierKindName = Annotated[str, AfterValidator(_known_classifier)]


class ClassifierSection(Section):
    """Classifier of an attribute. Short form: `kind:model`, as in `checkpoint:classifiers/mine`.

    Use different classifiers for training and for evaluation.
    """

    kind: _ClassifierKindName
    """Kind of classifier. `testbed`: the testbed's own. `transformers`: an image classification
    model. `zero_shot`: an open_clip model that compares faces, or whole images, with phrases.
    `checkpoint`: the output of `diffusers-fair classifier train`."""
    model: str = ""
    """The model. `transformers`: a Hub id or a folder. `zero_shot`: as `clip` below, without the
    prefix `open_clip:`. `checkpoint`: a folder. `testbed`: empty, or `evaluation` for the
    classifier that training never uses."""
    classes: dict[str, tuple[str, ...]] = {}
    """For `transformers` and `checkpoint`: class of the attribute -> labels of the model, whose
    probabilities are summed. Every label must be assigned to a class; case does not matter.
    Default: the labels are the classes."""
    trained_on: _OnlyIfGiven = ""
    """For `checkpoint`: labelled images that `diffusers-fair setup` trains the classifier on if the
    folder does not exist, as `classifier train` takes them: `hf:ORG/NAME/CONFIG` for a data set on
    the Hub, a folder or a parquet file."""
    label: _OnlyIfGiven = ""
    """For `checkpoint`: label column of `trained_on`. Default: the name of the attribute."""
    phrases: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    """For `zero_shot`: class of the attribute -> two or more phrases that describe it."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind, _, model = value.partition(":")
        return {"kind": kind, "model": model}

    @model_validator(mode="after")
    def _check_kind(self) -> "ClassifierSection":
        kind = CLASSIFIERS[self.kind]
        if kind.models and self.model not in kind.models:
            forms = [repr(f"{self.kind}:{model}".rstrip(":")) for model in kind.models]
            raise ValueError(f"expected {' or '.join(forms)}, got '{self.model}'")
        if not (kind.models or self.model):
            raise ValueError(f"a classifier of kind '{self.kind}' needs a model")
        if kind.takes == "phrases" and not self.phrases:
            raise ValueError(f"a classifier of kind '{self.kind}' needs phrases for each class")
        for key in ("phrases", "classes"):
            if getattr(self, key) and kind.takes != key:
                raise ValueError(f"a classifier of kind '{self.kind}' takes no {key}")
        for key in ("trained_on", "label"):
            if getattr(self, key) and not kind.trained_here:
                raise ValueError(f"a classifier of kind '{self.kind}' takes no {key}")
        return self


SETUP_KEYS = {"trained_on", "label"}
"""Keys of a classifier that only `diffusers-fair setup` reads: they change no result."""

Classifiers = Annotated[
    dict[str, ClassifierSection],
    BeforeValidator(lambda value: {"*": value} if isinstance(value, str) else value),
]


class JudgesSection(Section):
    """The models that judge images."""

    face_detector: _FaceDetectorName = "testbed"
    """Face detector. `none` finds no faces and loads no model; it suffices if all attributes are
    attributes of the whole image."""
    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed")}
    """Attribute -> its classifier. `*` stands for every attribute that is not listed;
    `classifiers: testbed` is short for `classifiers: {"*": testbed}`."""
    clip: _ClipName = "testbed"
    """First encoder of the semantics loss, also used for CLIP-T and CLIP-I. Model and weights of
    open_clip, as in `open_clip:ViT-H-14/laion2b_s32b_b79k`; or `open_clip:FOLDER` with its config
    and weights."""
    dino: _DinoName = "testbed"
    """Second encoder of the semantics loss, also used for the DINO score: Hub id or folder of a
    DINOv2 of transformers, as in `dinov2:facebook/dinov2-base`."""

    def classifier(self, attribute: Attribute) -> ClassifierSection:
        """Return the classifier of an attribute.

        Raises:
            ValueError: none is listed, its classes differ from the attribute's, or it does not see
                the attribute's region.
        """
        chosen = self.classifiers.get(attribute.name, self.classifiers.get("*"))
        if chosen is None:
            raise ValueError(
                f"there is no classifier for attribute '{attribute.name}': classifiers lists "
                f"{', '.join(self.classifiers) or 'none'}"
            )
        self._check_region(attribute, chosen)
        classes = [*chosen.classes, *chosen.phrases]
        if classes and set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier has {classes}: they must be the same"
            )
        return chosen

    def _check_region(self, attribute: Attribute, chosen: ClassifierSection) -> None:
        if attribute.of_faces and self.face_detector == "none":
            raise ValueError(
                f"attribute '{attribute.name}' has region 'face', but face_detector 'none' finds "
                "no faces: choose a face detector, or set the attribute's region to 'image'"
            )
        if not (attribute.of_faces or CLASSIFIERS[chosen.kind].sees_whole_images):
            raise ValueError(
                f"attribute '{attribute.name}' has region 'image', but classifiers of kind "
                f"'{chosen.kind}' only see faces: choose a classifier of another kind for it"
            )


class ModelsSection(JudgesSection):
    """The models that judge images in training, and the reference faces."""

    face_embedder: _FaceEmbedderName = "testbed"
    """Face embedder for `losses.face`; not loaded if that weight is 0. A timm model that was
    trained to distinguish faces: its name, as in `timm:hf-hub:ORG/MODEL`, or its folder, as in
    `timm:FOLDER`. Many such weights are licensed for research only: check the licence."""
    face_bank: str = "testbed"
    """Reference faces for `losses.face`: a folder of images of real faces, which are detected and
    embedded when training starts; a few thousand suffice. `testbed`: the testbed's portraits."""

    @model_validator(mode="after")
    def _check_reference_faces(self) -> "ModelsSection":
        bank = self.face_bank
        if bank in REFERENCE_FACES and self.face_embedder != bank:
            raise ValueError(
                f"face_bank '{bank}' holds embeddings of face_embedder '{bank}', not of "
                f"'{self.face_embedder}': choose a folder of images with faces instead"
            )
        return self


class EvaluationModelsSection(JudgesSection):
    """The models that judge images in evaluation; default: the testbed's evaluation classifiers."""

    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed", model="evaluation")}
    """As in `models`; none of them should be used in training."""
