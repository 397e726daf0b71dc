"""The recipe's sections on the models that judge images: face detector, classifiers, encoders."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from diffusers_fair.attributes import Attribute
from diffusers_fair.config.section import Section


def _one_of(*forms: str) -> AfterValidator:
    """Check that a model's name has one of these forms: `kind`, or `kind:WHAT`."""
    takes_value = {form.partition(":")[0]: ":" in form for form in forms}

    def check(name: str) -> str:
        kind, _, value = name.partition(":")
        if takes_value.get(kind) is not bool(value):
            raise ValueError(f"expected {' or '.join(map(repr, forms))}, got {name!r}")
        return name

    return AfterValidator(check)


FaceDetectorName = Annotated[str, _one_of("testbed", "retinaface", "none")]
ClipName = Annotated[str, _one_of("testbed", "open_clip:MODEL/WEIGHTS")]
DinoName = Annotated[str, _one_of("testbed", "dinov2:MODEL")]
FaceEmbedderName = Annotated[str, _one_of("testbed", "timm:MODEL")]


class ClassifierSection(Section):
    """The classifier of one attribute. Short form: `kind:model`, as `checkpoint:classifiers/mine`.

    Use different classifiers for training and for evaluation.
    """

    kind: Literal["testbed", "transformers", "zero_shot", "checkpoint"]
    """Kind of classifier. `testbed`: the testbed's own. `transformers`: an image classification
    model. `zero_shot`: an open_clip model that compares faces, or whole images, with phrases.
    `checkpoint`: the output of `diffusers-fair classifier train`."""
    model: str = ""
    """The model. `transformers`: a Hub id or a folder. `zero_shot`: as `clip` below, without the
    prefix `open_clip:`. `checkpoint`: a folder. `testbed`: empty, or `evaluation` for the
    classifier that training never uses."""
    classes: dict[str, tuple[str, ...]] = {}
    """For `transformers` and `checkpoint`: class of the attribute -> labels of the model, whose
    probabilities are summed. Every label must be assigned to a class; case does not matter. Left
    out: the labels are the classes."""
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
        if self.kind == "testbed" and self.model not in ("", "evaluation"):
            raise ValueError(f"expected 'testbed' or 'testbed:evaluation', got '{self.model}'")
        if self.kind != "testbed" and not self.model:
            raise ValueError(f"a classifier of kind '{self.kind}' needs a model")
        if self.kind == "zero_shot" and not self.phrases:
            raise ValueError("a classifier of kind 'zero_shot' needs phrases for each class")
        if self.phrases and self.kind != "zero_shot":
            raise ValueError(f"a classifier of kind '{self.kind}' takes no phrases")
        if self.classes and self.kind not in ("transformers", "checkpoint"):
            raise ValueError(f"a classifier of kind '{self.kind}' takes no classes")
        return self


Classifiers = Annotated[
    dict[str, ClassifierSection],
    BeforeValidator(lambda value: {"*": value} if isinstance(value, str) else value),
]


class JudgesSection(Section):
    """The models that judge images."""

    face_detector: FaceDetectorName = "testbed"
    """Face detector. `none` finds no faces and loads no model; it suffices if all attributes are
    attributes of the whole image."""
    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed")}
    """Attribute -> its classifier. `*` stands for every attribute that is not listed;
    `classifiers: testbed` is short for `classifiers: {"*": testbed}`."""
    clip: ClipName = "testbed"
    """First encoder of the semantics loss, also used for CLIP-T and CLIP-I. Model and weights of
    open_clip, as in `open_clip:ViT-H-14/laion2b_s32b_b79k`; or `open_clip:FOLDER` with its config
    and weights."""
    dino: DinoName = "testbed"
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
                f"there is no classifier for attribute '{attribute.name}': classifiers names "
                f"{', '.join(self.classifiers) or 'none'}"
            )
        self._check_region(attribute, chosen)
        classes = [*chosen.classes, *chosen.phrases]
        if classes and set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier is given {classes}: they must be the same"
            )
        return chosen

    def _check_region(self, attribute: Attribute, chosen: ClassifierSection) -> None:
        if attribute.of_faces and self.face_detector == "none":
            raise ValueError(
                f"attribute '{attribute.name}' is of faces, which face_detector 'none' does not "
                "find: name a face detector, or set the attribute's region to 'image'"
            )
        if chosen.kind == "testbed" and not attribute.of_faces:
            raise ValueError(
                f"attribute '{attribute.name}' is of the whole image, and the testbed's "
                "classifiers see faces: name a classifier of another kind for it"
            )


class ModelsSection(JudgesSection):
    """The models that judge images in training, and the reference faces."""

    face_embedder: FaceEmbedderName = "testbed"
    """Face embedder for `losses.face`; not loaded if that weight is 0. A timm model that was
    trained to distinguish faces: its name, as in `timm:hf-hub:ORG/MODEL`, or its folder, as in
    `timm:FOLDER`. Many such weights are licensed for research only: check the licence."""
    face_bank: str = "testbed"
    """Reference faces for `losses.face`: a folder of images of real faces, which are detected and
    embedded when training starts; a few thousand suffice. `testbed`: the testbed's portraits."""

    @model_validator(mode="after")
    def _check_reference_faces(self) -> "ModelsSection":
        if self.face_bank == "testbed" and self.face_embedder != "testbed":
            raise ValueError(
                "face_bank 'testbed' holds embeddings by the testbed's own face_embedder, not by "
                f"'{self.face_embedder}': name a folder of images with faces"
            )
        return self


class EvaluationModelsSection(JudgesSection):
    """The models that judge images in evaluation; default: the testbed's evaluation classifiers."""

    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed", model="evaluation")}
    """As in `models`; none of them should be used in training."""
