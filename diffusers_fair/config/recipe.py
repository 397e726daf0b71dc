"""The recipe: what a training run is told, from YAML and back.

Every key has its documentation below it and, where there is a usual value, that value: the paper's
for one attribute of two classes (appendix A.2), unless it says otherwise.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from diffusers_fair import atomic
from diffusers_fair.attributes import Attribute, People, Region
from diffusers_fair.config.backends import (
    CLASSIFIERS,
    CLIPS,
    DINOS,
    FACE_DETECTORS,
    FACE_EMBEDDERS,
    REFERENCE_FACES,
    Kinds,
)
from diffusers_fair.prompts.tables import read_table, targets_by_prompt
from diffusers_fair.prompts.wording import Wording

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        model_validator,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"recipes need '{error.name}', which comes with: pip install 'diffusers-fair[train]'",
        name=error.name,
    ) from error

RECIPES = Path(__file__).parents[1] / "recipes"
RUN_FILE = "recipe.yaml"  # of a run folder: the recipe as run

Weight = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Group = Annotated[int, Field(ge=2, strict=True)]
Steps = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(lambda steps: (steps, steps) if isinstance(steps, int) else steps),
]


def _printable(word: str) -> str:
    """Words go into the adapter's folder, which takes no others."""
    if not (word.strip() and word.isprintable()):
        raise ValueError(f"expected printable characters, got {ascii(word)[:100]}")
    return word


Word = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Words = Annotated[tuple[Word, ...], Field(min_length=1, max_length=300)]


def _weighted(sets: Any) -> Any:
    """Equal weights for sets that have none."""
    return dict.fromkeys(sets, 1.0) if isinstance(sets, list) else sets


def _one_of(forms: Kinds) -> AfterValidator:
    """Check that the name of a model has one of these forms: `kind` or `kind:ARGUMENT`."""
    kinds = {form.partition(":")[0]: ":" in form for form in forms}

    def check(name: str) -> str:
        kind, _, what = name.partition(":")
        if kinds.get(kind) is not bool(what):
            raise ValueError(f"expected {' or '.join(map(repr, forms))}, got {name!r}")
        return name

    return AfterValidator(check)


def _known_classifier(kind: str) -> str:
    if kind not in CLASSIFIERS:
        *others, last = map(repr, CLASSIFIERS)
        raise ValueError(f"expected {', '.join(others)} or {last}, got {kind!r}")
    return kind


FaceDetectorName = Annotated[str, _one_of(FACE_DETECTORS)]
ClipName = Annotated[str, _one_of(CLIPS)]
DinoName = Annotated[str, _one_of(DINOS)]
FaceEmbedderName = Annotated[str, _one_of(FACE_EMBEDDERS)]
ClassifierKindName = Annotated[str, AfterValidator(_known_classifier)]


class Section(BaseModel):
    """A part of the recipe: keyword-only, immutable, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class BaseSection(Section):
    """The model that is aligned."""

    model: str
    """`testbed`, a Hub id or a folder."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """What the frozen parts compute in; the adapter's weights are float32. `auto` is bfloat16 where
    the GPU or the processor is faster in it, else float32."""


class AttributeSection(Section):
    """One attribute to balance, and how."""

    name: str
    """What it is called; the classifier is chosen by it."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the classifier's probabilities."""
    target: tuple[float, ...] = ()
    """Share wanted of each class. Left out: equal shares."""
    targets: dict[str, tuple[float, ...]] = {}
    """Targets of some prompts of their own: a prompt, or a subject of the prompt sets such as an
    occupation -> share wanted of each class. Or the path of a table: a CSV file whose columns are
    the prompt or subject and the classes, or JSON."""
    region: Region = "face"
    """What the classifier sees: `face`, a crop around the face, where images without one take no
    part; or `image`, the whole image squeezed to a square, where every image takes part."""
    words: dict[str, Words] = {}
    """Class -> words that ask for it before the subject of a prompt, as in "a female chef". Kept
    prompts and `evaluate` use them, the methods of `evaluate --baseline`, and adapters that respect
    words. A class that is left out is asked for by its name."""
    nouns: dict[str, Words] = {}
    """Class -> nouns that ask for it in place of "person", such as "woman". A class that is left
    out has none."""
    threshold: Share = 0.8
    """C: images whose target is less certain than this take no part in the alignment loss. The more
    classes, the fewer are certain where a prompt is near its target, and the weaker it pulls there:
    lower it then, or draw more images of each prompt."""
    cost: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the attribute in the transport cost, when several are balanced jointly."""
    steering: Annotated[float, Field(ge=0)] = 0.0
    """Share of a lasting gap between the target and the classes of training's images by which the
    target that training aims for moves in each iteration. 0: it stays, as published."""
    semantics_changed: Share = 0.2
    """lambda_2 / lambda_1: how much of `losses.semantics` is left where the class is to change,
    outside the face. Of several attributes of an image that are to change, the smallest counts."""
    semantics_face: Share = 0.2
    """lambda_3 / lambda_2: how much of that is left inside the face; the smallest counts. Not used
    by attributes of the whole image."""

    @model_validator(mode="before")
    @classmethod
    def _read_table(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("targets"), str):
            table = read_table(value["targets"], list(map(str, value.get("classes") or ())))
            return value | {"targets": table}
        return value

    @model_validator(mode="after")
    def _check_attribute(self) -> "AttributeSection":
        self.attribute()
        for key in ("words", "nouns"):
            for name in getattr(self, key):
                if name not in self.classes:
                    raise ValueError(
                        f"{key} are for the classes {list(self.classes)}, got '{name}'"
                    )
        return self

    def wording(self) -> Wording:
        """The attribute and the words that ask for its classes."""
        return Wording(self.attribute(), self.words, self.nouns)

    def attribute(self, sets: Iterable[str] = ()) -> Attribute:
        """The attribute alone, its target filled in.

        Args:
            sets: prompt sets whose prompts `targets` speaks of; left out, whole prompts alone.

        Raises:
            ValueError: targets for a prompt or subject that is not in the sets.
        """
        own = targets_by_prompt(self.targets, sets) if sets else self.targets
        return Attribute(self.name, self.classes, self.target, own, self.region)


class KeepSection(Section):
    """Prompts that the adapter has to leave as the base model draws them."""

    sets: Annotated[dict[str, Weight], BeforeValidator(_weighted), Field(min_length=1)] | None = (
        None
    )
    """`named`: prompts whose words name a class of an attribute. `implied`: prompts that imply one.
    `untouched`, or on the testbed `testbed-untouched`: prompts that show nobody, the empty prompt,
    and negative prompts. Or prompt sets and files of your own. A list, or a mapping of names to
    weights. Null: twice as many of the first as of the second and the third."""
    images: Count = 8
    """Images of kept prompts in each iteration, one for each prompt. They have to look like the
    original images, and to show the class that their prompt names."""
    weight: Weight = 1.0
    """Weight of the loss of these images relative to the loss of the others."""
    distinct: Positive = 96
    """Number of different kept images. After that they repeat, and their originals come from the
    cache."""
    embedding: Annotated[float, Field(ge=0)] = 3.0
    """Weight of the squared change of the embeddings of kept prompts, as a share of their squared
    length. For an adapter with layers in the text encoder alone or beside the U-Net's; costs next
    to nothing. 0 does without."""
    texts: Positive = 32
    """Kept prompts whose embeddings are compared in each iteration."""
    prediction: Annotated[float, Field(ge=0)] = 50.0
    """Weight of the squared difference between the U-Net's guided predictions with and without the
    adapter, on the original model's way to images of kept prompts. Costs little, as nothing is
    drawn with the adapter; 0 does without."""
    pairs: Positive = 24
    """Pairs of kept prompt and sampling step whose predictions are compared in each iteration."""
    new_prompts: Positive = 2
    """Number of kept prompts whose sampling steps enter the pool in each iteration."""
    pool: Positive = 48
    """Number of iterations for which sampled steps stay in the pool."""


class PromptsSection(Section):
    """The prompts to train and to validate on."""

    sets: Annotated[dict[str, Weight], BeforeValidator(_weighted), Field(min_length=1)]
    """Packaged prompt lists, or files as `prompt_set` reads them: a list of names, or a mapping of
    names to weights, which are the shares of their prompts in training."""
    train: str = "train"
    """Split that the adapter is trained on."""
    validation: str = "validation"
    """Split that the best checkpoint is chosen by."""
    images_per_prompt: Group = 24
    """N: images of one prompt whose distribution is compared with the target."""
    keep: KeepSection | None = None
    """Prompts whose images must stay those of the base model, since their words settle who is shown
    or nobody is; trained beside the neutral ones. Null, as published: the adapter changes these,
    too."""


class ClassifierSection(Section):
    """The classifier of one attribute; in short `kind:model`, as in `checkpoint:classifiers/mine`.

    Keep the classifiers of evaluation apart from those of training.
    """

    kind: ClassifierKindName
    """What it is: `testbed`, the testbed's own; `transformers`, an image classification model;
    `zero_shot`, an open_clip model that compares faces, or whole images, with phrases;
    `checkpoint`, what `diffusers-fair classifier train` made."""
    model: str = ""
    """Of `transformers`, a Hub id or a folder; of `zero_shot`, as in `clip` below, without the
    `open_clip:`; of `checkpoint`, a folder; of `testbed`, nothing, or `evaluation` for the one that
    training never sees."""
    classes: dict[str, tuple[str, ...]] = {}
    """Of `transformers` and `checkpoint`: class of the attribute -> labels of the model, whose
    probabilities are summed. Every label has its class; case does not matter. Left out: the labels
    are the classes."""
    phrases: dict[str, Annotated[tuple[str, ...], Field(min_length=2)]] = {}
    """Of `zero_shot`: class of the attribute -> two or more phrases for it."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
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
        return self


Classifiers = Annotated[
    dict[str, ClassifierSection],
    BeforeValidator(lambda value: {"*": value} if isinstance(value, str) else value),
]


class JudgesSection(Section):
    """What looks at the images."""

    face_detector: FaceDetectorName = "testbed"
    """Finds the largest face of an image. `none` finds no face and needs no model: enough where all
    attributes are of the whole image."""
    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed")}
    """Attribute -> its classifier; `*` stands for every attribute that is not named, and
    `classifiers: testbed` for `classifiers: {"*": testbed}`."""
    clip: ClipName = "testbed"
    """First encoder of the semantics loss, CLIP-T and CLIP-I. open_clip's model and weights, as in
    `open_clip:ViT-H-14/laion2b_s32b_b79k`; or `open_clip:FOLDER` with its config and weights."""
    dino: DinoName = "testbed"
    """Second encoder of the semantics loss, and DINO: Hub id or folder of a DINOv2 of transformers,
    as in `dinov2:facebook/dinov2-base`."""

    def classifier(self, attribute: Attribute) -> ClassifierSection:
        """The classifier of an attribute.

        Raises:
            ValueError: there is none, it gives other classes than the attribute's, or it does not
                see the attribute's region.
        """
        chosen = self.classifiers.get(attribute.name, self.classifiers.get("*"))
        if chosen is None:
            raise ValueError(
                f"there is no classifier for attribute '{attribute.name}': classifiers names "
                f"{', '.join(self.classifiers) or 'none'}"
            )
        if attribute.of_faces and self.face_detector == "none":
            raise ValueError(
                f"attribute '{attribute.name}' is of faces, which face_detector 'none' does not "
                "find: name a face detector, or set the attribute's region to 'image'"
            )
        if not (attribute.of_faces or CLASSIFIERS[chosen.kind].sees_whole_images):
            raise ValueError(
                f"attribute '{attribute.name}' is of the whole image, and the {chosen.kind}'s "
                "classifiers see faces: name a classifier of another kind for it"
            )
        classes = [*chosen.classes, *chosen.phrases]
        if classes and set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier is told of {classes}: they must be the same"
            )
        return chosen


class ModelsSection(JudgesSection):
    """What looks at the images in training, and the real faces it knows."""

    face_embedder: FaceEmbedderName = "testbed"
    """Says what a face looks like, for `losses.face`; without that it is not loaded. A model of
    timm that was trained to tell faces apart, by its name, as `timm:hf-hub:ORG/MODEL`, or by its
    folder, as `timm:FOLDER`. The weights of many are for research only: mind the licence."""
    face_bank: str = "testbed"
    """Real faces for `losses.face`: a folder of pictures, in which faces are found and embedded
    when training starts; a few thousand do. `testbed`: the testbed's portraits."""

    @model_validator(mode="after")
    def _check_bank(self) -> "ModelsSection":
        bank = self.face_bank
        if bank in REFERENCE_FACES and self.face_embedder != bank:
            raise ValueError(
                f"face_bank '{bank}' holds what the {bank}'s own face_embedder saw, not "
                f"'{self.face_embedder}': name a folder of pictures with faces"
            )
        return self


class EvaluationModelsSection(JudgesSection):
    """The same for evaluation, with the testbed's evaluation classifiers where none is named."""

    classifiers: Classifiers = {"*": ClassifierSection(kind="testbed", model="evaluation")}
    """As in `models`; they should be none that training uses."""


class AdapterSection(Section):
    """What is trained."""

    components: Annotated[
        tuple[Literal["text_encoder", "unet", "soft_tokens"], ...], Field(min_length=1)
    ] = ("text_encoder",)
    """The parts of the pipeline that get low-rank layers; soft tokens before every prompt."""
    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = 50
    """Rank of the layers."""
    soft_tokens: Annotated[int, Field(ge=1, le=75, strict=True)] = 5
    """Number of soft tokens."""
    init_from: str | None = None
    """An adapter of the same base and components to start from: its folder or its Hub id."""


class SamplingSection(Section):
    """How images are made in training."""

    steps: Steps = (19, 23)
    """K: scheduler steps, a number or `[low, high]`, drawn for each iteration."""
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    """s of classifier-free guidance; 1 is none."""
    antithetic: bool = False
    """Draw each prompt's noise in pairs z, -z, each still normal. Where such images differ in class
    more often than by chance, as on the testbed, the shares of a batch scatter less, and with them
    what the loss asks for."""


class GradientSection(Section):
    """How the gradient gets from the image to the adapter."""

    method: Literal["replay", "autograd", "naive", "truncated"] = "replay"
    """`replay` and `autograd` give the paper's biased gradient, step by step or, as in its
    Algorithm 1, in one graph; `naive` the exact one; `truncated` the exact one of the last steps.
    All but `replay` are for comparison: their memory grows with the steps."""
    standardize: Literal["paper", "exact", "none"] = "exact"
    """Weights of the steps in the biased gradient: the paper's coefficients, all equal, or the
    scheduler's own. All equal left the least bias of the three in model_cards/benchmarks."""
    replay_steps: Positive | None = None
    """Of `replay`: steps drawn for each image's gradient, inversely weighted; null is all."""
    truncated_steps: Positive | None = None
    """Of `truncated`: how many of the last steps the gradient goes through."""

    @model_validator(mode="after")
    def _check_method(self) -> "GradientSection":
        for key, method in (("replay_steps", "replay"), ("truncated_steps", "truncated")):
            value = getattr(self, key)
            if value is not None and self.method != method:
                raise ValueError(
                    f"{key} is for method '{method}', got {value} with method '{self.method}': "
                    "set it to null, or leave it out"
                )
        if self.method == "truncated" and self.truncated_steps is None:
            raise ValueError("method 'truncated' needs truncated_steps, how many of the last steps")
        return self


class LossesSection(Section):
    """Weights beside the alignment loss, whose weight is 1 (section 4.1)."""

    semantics: Annotated[float, Field(ge=0)] = 8.0
    """lambda_1: of the distance to the original image where its classes are the targets already;
    attributes say what is left of it elsewhere."""
    face: Annotated[float, Field(ge=0)] = 0.0
    """lambda_face: of the distance between a face and the nearest real one."""


class OptimizerSection(Section):
    """AdamW and what goes with it."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its state in 8 bits, by bitsandbytes, which has to be installed."""
    lr: Annotated[float, Field(gt=0)] = 5e-5
    """Learning rate after the warm-up."""
    text_encoder_lr: Annotated[float, Field(gt=0)] | None = None
    """Another one for the layers of the text encoder and soft tokens; null is `lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up: stays, or falls to 0."""
    warmup: Count = 0
    """Iterations in which the learning rate rises from 0."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.996
    """Of the moving average of the weights, which is what is validated and saved; 0 is none."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Longer gradients are shortened to this; null leaves them."""


class TrainSection(Section):
    """How long, and what is written on the way."""

    iterations: Positive = 10_000
    """Updates of the weights."""
    prompts_per_iteration: Positive = 1
    """Prompts in one update, over all processes."""
    distinct_iterations: Positive | None = None
    """Iterations with prompts, noise and steps of their own; then they come again, and what was
    seen in the original images comes from the disk. Null: never again."""
    micro_batch: Positive | None = None
    """Images that the U-Net, the decoder and the judges see at a time, in each process; null is
    all. Costs time and saves memory, and changes nothing else."""
    memory_budget: Weight | None = None
    """GB for each process, from which `micro_batch` is chosen when training starts: of the GPU's
    memory, or of all that the process takes on the CPU. Where it does not hold one image, it turns
    `split_guidance` on, and then `gradient_checkpointing`."""
    split_guidance: bool = False
    """Replay evaluates the U-Net for the prompt and for the empty one after another, not together,
    which halves its memory. Changes nothing else."""
    gradient_checkpointing: bool = False
    """The U-Net keeps less for the backward pass and evaluates its blocks again there, which takes
    longer. Changes nothing else."""
    channels_last: bool = False
    """U-Net and decoder compute with the channels last, which most GPUs are faster at in half
    precision."""
    compile: bool = False
    """The U-Net runs by torch.compile; for long trainings, as the first iterations take minutes."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` is what accelerate finds, a GPU if there is one; the testbed stays on the CPU."""
    seed: Count = 0
    """Of the prompts, the noise and the adapter's first weights."""
    checkpoint_every: Positive = 200
    """Iterations between checkpoints."""
    validate_every: Positive | None = 200
    """Iterations between validations; null is never, and no best adapter is kept."""
    validation_images: Positive = 24
    """Images of each validation prompt."""
    clip_t_drop: Annotated[float, Field(ge=0)] = 0.01
    """The best adapter has the least validation bias of those whose CLIP-T is no further below the
    base model's than this."""
    keep: Positive = 2
    """Newest checkpoints that stay on the disk."""
    max_skipped: Positive = 10
    """Updates that may be skipped in a row, for images or gradients that are not finite, before
    training stops; each halves the learning rate of the next ones for a while."""

    @model_validator(mode="after")
    def _check_memory(self) -> "TrainSection":
        if self.micro_batch is not None and self.memory_budget is not None:
            raise ValueError(
                f"memory_budget chooses micro_batch, got both ({self.memory_budget:g} and "
                f"{self.micro_batch}): set one of them to null, or leave it out"
            )
        return self


class EvaluationSection(Section):
    """How the finished adapter is measured."""

    split: str = "test"
    """Split of the prompt sets."""
    images_per_prompt: Group = 60
    """Images of each prompt."""
    steps: Positive = 25
    """Scheduler steps."""
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    """s of classifier-free guidance."""
    seed: Count = 0
    """Of the noise, which is the same with and without the adapter."""
    models: EvaluationModelsSection = EvaluationModelsSection()
    """What looks at the images: none that training uses."""


class RunConfig(Section):
    """A whole recipe."""

    base: BaseSection
    attributes: Annotated[tuple[AttributeSection, ...], Field(min_length=1)]
    people: People = "largest"
    """Which faces of an image count for the attributes of faces, in training and in evaluation:
    the `largest`, or `all`. It says what a fair share is a share of, so it is neither a matter of
    one attribute nor of the models that look. Not used by attributes of the whole image."""
    prompts: PromptsSection
    models: ModelsSection = ModelsSection()
    adapter: AdapterSection = AdapterSection()
    sampling: SamplingSection = SamplingSection()
    gradient: GradientSection = GradientSection()
    losses: LossesSection = LossesSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracker: Literal["tensorboard", "none"] = "none"
    """Where curves and sample images go, beside `events.jsonl`."""
    output: str
    """Folder of the run."""

    @model_validator(mode="after")
    def _check_together(self) -> "RunConfig":
        low, high = self.sampling.steps
        if low > high:
            raise ValueError(f"sampling.steps must be [low, high], low <= high, got {[low, high]}")
        for key in ("replay_steps", "truncated_steps"):
            count = getattr(self.gradient, key)
            if (count or 0) > low:
                raise ValueError(
                    f"gradient.{key} must be at most sampling.steps ({low}), got {count}"
                )
        if self.optimizer.text_encoder_lr and set(self.adapter.components) == {"unet"}:
            raise ValueError(
                "optimizer.text_encoder_lr is of text_encoder and soft_tokens, adapter.components "
                "has neither: add one, or set optimizer.lr alone"
            )
        names = [attribute.name for attribute in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attributes must have different names, got {names}")
        for models in (self.models, self.evaluation.models):
            for attribute in self.attributes:
                models.classifier(attribute.attribute())
        if self.losses.face and self.models.face_detector == "none":
            raise ValueError(
                f"losses.face is {self.losses.face:g}, and models.face_detector 'none' finds no "
                "face: name a face detector, or set losses.face to 0"
            )
        if any(attribute.targets for attribute in self.attributes):
            self.balanced()
        if self.prompts.keep and not self._keeps_anything(self.prompts.keep):
            raise ValueError(
                "prompts.keep trains nothing: set prompts.keep.images or prompts.keep.prediction "
                "above 0, or prompts.keep to null"
            )
        return self

    def _keeps_anything(self, keep: KeepSection) -> bool:
        held = keep.embedding if self.embeddings_stay else 0
        return bool(keep.images or keep.prediction or held)

    @property
    def embeddings_stay(self) -> bool:
        """Whether the embeddings of kept prompts can stay: soft tokens shift them all."""
        trained = self.adapter.components
        return "text_encoder" in trained and "soft_tokens" not in trained

    def balanced(self) -> list[Attribute]:
        """The attributes, with the targets of each prompt's own.

        Raises:
            ValueError: targets for a prompt or subject that is not in the prompt sets.
        """
        return [section.attribute(self.prompts.sets) for section in self.attributes]

    @classmethod
    def load(
        cls, recipe: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()
    ) -> "RunConfig":
        """Read a recipe, and below it the one that it names under `extends`, if it does.

        Args:
            recipe: a YAML file, or the name of a shipped recipe.
            overrides: `key=value` with the key's path in dots and the value in YAML
                (`train.iterations=10`, `attributes.0.target=[.5,.5]`), or the same as a mapping.

        Raises:
            ValueError: one sentence: no such recipe, an unknown key with the nearest known one, a
                value with what was expected and what was got.
        """
        data = _read(_recipe_file(recipe))
        pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
        for key, value in pairs:
            _set(data, key.split("."), value, key)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"recipe '{recipe}': {_sentences(error)}") from error

    def to_yaml(self) -> str:
        """Write the whole recipe, defaults included; `load` reads it back to an equal one."""
        data = self.model_dump(mode="json")
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)

    def claim_output(self) -> Path:
        """Make the run folder and put the recipe in it, or find the same run there to go on with.

        Raises:
            ValueError: the folder holds another run, or something else.
        """
        folder, recipe = Path(self.output), Path(self.output) / RUN_FILE
        if not recipe.exists():
            if folder.exists() and (not folder.is_dir() or _foreign(folder)):
                raise ValueError(f"output '{folder}' holds something else: choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write(recipe, self.to_yaml().encode())
        different = self.differences(RunConfig.load(recipe))
        if different:
            key, (mine, theirs) = next(iter(different.items()))
            raise ValueError(
                f"output '{folder}' holds another run ({key} is {theirs} there and {mine} here): "
                "choose another folder, or the same recipe to go on"
            )
        return folder

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ, but for the output, sorted: 'a.0.b' -> (ours, theirs)."""
        ours, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        keys = sorted({*ours, *theirs} - {"output"})
        pairs = {key: (ours.get(key), theirs.get(key)) for key in keys}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _foreign(folder: Path) -> bool:
    """Whether a folder holds more than processes leave there that are just claiming it."""
    return any(
        path.name != RUN_FILE and not path.name.startswith(atomic.PARTIAL)
        for path in folder.iterdir()
    )


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read(path: Path, through: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys and values of a recipe, on top of those of the recipe that it extends."""
    data = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"recipe '{path}' must hold keys and values, got {data!r}")
    if path in through:
        raise ValueError(f"recipe '{path}' extends itself: {' -> '.join(map(str, through))}")
    extended = data.pop("extends", None)
    if extended is None:
        return data
    return _merged(_read(_recipe_file(extended), (*through, path)), data)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section; where both have a value or a list, that of `above`."""
    both = {
        key: _merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


def _recipe_file(recipe: str | Path) -> Path:
    """The file itself, or that of the shipped recipe of this name."""
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipes():
        return RECIPES / f"{recipe}.yaml"
    hint = _nearest(str(recipe), recipes())
    raise ValueError(f"there is no recipe '{recipe}', neither a file nor shipped: {hint}")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"'{where}' is not YAML: {' '.join(str(error).split())}") from error


def _split(override: str) -> tuple[str, Any]:
    """`a.b=[1, 2]` -> 'a.b', [1, 2]."""
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise ValueError(f"an override must be key=value, got '{override}'")
    return key, _parse_yaml(value, override)


def _set(tree: Any, path: list[str], value: Any, key: str) -> None:
    """Set one value, or those that a mapping names; a section that the file leaves out is made.

    A mapping takes the place of a list.
    """
    if isinstance(value, dict) and value and not isinstance(_get(tree, path), list):
        for name, inner in value.items():
            _set(tree, [*path, str(name)], inner, key)
        return
    for i, name in enumerate(path):
        if isinstance(tree, list) and not (name.isdecimal() and int(name) < len(tree)):
            raise ValueError(f"override '{key}': expected 0 to {len(tree) - 1}, got '{name}'")
        if not isinstance(tree, (list, dict)):
            raise ValueError(f"override '{key}': '{'.'.join(path[:i])}' has no keys")
        place: Any = int(name) if isinstance(tree, list) else name
        if i == len(path) - 1:
            if value == {} and isinstance(tree, dict) and isinstance(tree.get(place), dict):
                return  # nothing to set in a section that is there
            tree[place] = value
        elif isinstance(tree, dict) and tree.get(place) is None:
            tree[place] = {}
        tree = tree[place]


def _get(tree: Any, path: list[str]) -> Any:
    """What is at a path of mappings; None if nothing is."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _sentences(error: ValidationError) -> str:
    """What pydantic found wrong, without what only follows from it."""
    places = [problem["loc"] for problem in error.errors()]
    return "; ".join(
        _sentence(problem)
        for problem in error.errors()
        if not any(place[: len(problem["loc"])] == problem["loc"] != place for place in places)
    )


def _sentence(problem: Any) -> str:
    """One thing that is wrong, as: key, expected, got."""
    key, context = ".".join(map(str, problem["loc"])), problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            *parents, word = problem["loc"]
            return f"unknown key '{key}': {_nearest(str(word), _known_keys(parents))}"
        case "missing":
            return f"'{key}' is missing"
        case "value_error":
            return f"{key}: {context['error']}".removeprefix(": ")
        case "too_short":
            return f"{key}: expected {context['min_length']} or more, got {len(problem['input'])}"
        case "model_type":
            return f"{key}: expected a section of keys and values, got {problem['input']!r}"
    expected = re.sub(r", (unable|got|not) .*", "", problem["msg"])
    return f"{key}: {expected.replace('Input should be', 'expected')}, got {problem['input']!r}"


def _known_keys(parents: Sequence[str | int]) -> list[str]:
    """The keys of the section at this path."""
    section: type[BaseModel] = RunConfig
    for name in parents:
        if name in section.model_fields:  # not a place in a list, nor a name that the user chose
            kind = section.model_fields[name].annotation
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
            section = next(k for k in kinds if issubclass(k, Section))
    return list(section.model_fields)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys and indices -> 'a.0.b': value."""
    if not isinstance(tree, (dict, list, tuple)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value
        for name, inner in items
        for key, value in _flat(inner, f"{prefix}.{name}".removeprefix(".")).items()
    }
