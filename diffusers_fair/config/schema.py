"""The recipe's keys: the configuration of a training run.

The docstring below each key is its documentation. Unless stated otherwise, defaults are the paper's
values for one attribute of two classes (appendix A.2).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from diffusers_fair.attributes import Attribute, People, Region
from diffusers_fair.config.errors import sentences
from diffusers_fair.config.models import SETUP_KEYS, EvaluationModelsSection, ModelsSection
from diffusers_fair.config.recipe import Overrides, read_recipe
from diffusers_fair.config.section import (
    Fraction,
    Gigabytes,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    TwoOrMore,
    WeightedSets,
    Words,
    require_distinct,
)
from diffusers_fair.devices import checked_device
from diffusers_fair.prompts.tables import read_table, targets_by_prompt
from diffusers_fair.prompts.wording import Wording

_StepsRange = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(lambda steps: (steps, steps) if isinstance(steps, int) else steps),
]


class BaseSection(Section):
    """The model to align."""

    model: str
    """`testbed`, `testbed-flux`, a Hub id, a folder or a single `.safetensors` file."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the frozen parts; the adapter's weights are float32. `auto`: bfloat16 if the
    device of the training, a GPU or the processor, is faster in it, else float32."""


class AttributeSection(Section):
    """An attribute to balance, and its options."""

    name: str
    """Name of the attribute, which selects its classifier."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the classifier's probabilities."""
    target: tuple[Number, ...] = ()
    """Target share of each class. Default: equal shares."""
    targets: dict[str, tuple[Number, ...]] = {}
    """Targets of individual prompts: prompt, or subject of a prompt set such as an occupation ->
    target share of each class. Or the path of a table: a CSV file whose columns are the prompt or
    subject and the classes, or JSON."""
    region: Region = "face"
    """Region that the classifier sees. `face`: a crop around the face; images without a face are
    not counted. `image`: the whole image, resized to a square; every image is counted."""
    words: dict[str, Words] = {}
    """Class -> words that name it before the subject of a prompt, as in "a female chef". Used by
    kept prompts, `evaluate`, its baselines, and adapters that respect words. Default for a class:
    its name."""
    nouns: dict[str, Words] = {}
    """Class -> nouns that name it in place of "person", such as "woman". Default for a class:
    none."""
    threshold: Fraction = 0.8
    """C: minimum confidence of an image's target class; other images do not contribute to the
    alignment loss. With more classes, fewer images are confident near the target, which weakens the
    loss: lower the threshold, or generate more images per prompt."""
    cost: PositiveFloat = 1.0
    """Weight of the attribute in the transport cost when several attributes are balanced
    jointly."""
    target_feedback: Annotated[
        Number,
        Field(
            ge=0,
            validation_alias=AliasChoices("target_feedback", "steering"),
            serialization_alias="steering",
        ),
    ] = 0.0
    """Integral gain of the feedback that shifts the training target against a persistent gap; 0
    disables it, as in the paper. The released name of this key, `steering`, keeps working."""
    semantics_changed: Fraction = 0.2
    """lambda_2 / lambda_1: fraction of `losses.semantics` for images whose class should change. If
    several attributes should change, the smallest fraction applies."""
    semantics_face: Fraction = 0.2
    """lambda_3 / lambda_2: further factor inside the faces of these images. If several attributes
    should change, the smallest applies. Ignored for attributes of the whole image."""

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
        """Return the attribute and the words that name its classes."""
        return Wording(self.attribute(), self.words, self.nouns)

    def attribute(self, sets: Iterable[str] = ()) -> Attribute:
        """Return the attribute without training options, and with its default target filled in.

        Args:
            sets: prompt sets whose prompts or subjects `targets` names; without any, `targets` must
                name whole prompts.

        Raises:
            ValueError: targets for a prompt or subject that is not in the sets.
        """
        targets = targets_by_prompt(self.targets, sets) if sets else self.targets
        return Attribute(self.name, self.classes, self.target, targets, self.region)


class KeepSection(Section):
    """Prompts whose images the adapter must not change."""

    sets: WeightedSets | None = None
    """Prompt sets. `named`: prompts whose words name a class of an attribute. `implied`: prompts
    that imply one. `untouched`, or `testbed-untouched` on the testbed: prompts that show nobody,
    the empty prompt, and negative prompts. Other prompt sets and files are possible, too. A list of
    names, or a mapping of names to weights. Null: these three, `named` with twice the weight."""
    images: NonNegativeInt = 8
    """Images of kept prompts per iteration, one per prompt. They must look like the original
    images and show the class that their prompt names."""
    weight: PositiveFloat = 1.0
    """Weight of the loss of these images relative to the loss of the other images."""
    distinct: PositiveInt = 96
    """Number of distinct kept images. Later ones repeat them and reuse cached judgements of their
    original images."""
    embedding: NonNegativeFloat = 3.0
    """Weight of the relative squared change of the embeddings of kept prompts. Applies to adapters
    with layers in the text encoder and no soft tokens; costs next to nothing. 0 disables it."""
    texts: PositiveInt = 32
    """Kept prompts whose embeddings are compared per iteration."""
    prediction: NonNegativeFloat = 50.0
    """Weight of the squared difference between the denoiser's guided predictions with and without
    the adapter, at latents of the original model's trajectories for kept prompts. Cheap, as nothing
    is sampled with the adapter. 0 disables it."""
    pairs: PositiveInt = 24
    """Pairs of kept prompt and sampling step whose predictions are compared per iteration."""
    new_prompts: PositiveInt = 2
    """Kept prompts whose sampling steps are added to the pool per iteration."""
    pool: PositiveInt = 48
    """Number of iterations that sampling steps stay in the pool."""


class PromptsSection(Section):
    """The prompts of training and validation."""

    sets: WeightedSets
    """Packaged prompt sets, or files: a list of names, or a mapping of names to weights, which are
    the proportions of their prompts in training."""
    train: str = "train"
    """Split to train on."""
    validation: str = "validation"
    """Split to choose the best adapter by."""
    images_per_prompt: TwoOrMore = 24
    """N: images per prompt whose class distribution is compared with the target."""
    keep: KeepSection | None = None
    """Prompts whose images the adapter must not change, because their words determine who is shown
    or because they show nobody; trained on together with the neutral prompts. Null, as in the
    paper: the adapter changes these images, too."""


class AdapterSection(Section):
    """The adapter to train."""

    components: Annotated[
        tuple[Literal["text_encoder", "text_encoder_2", "unet", "transformer", "soft_tokens"], ...],
        Field(min_length=1),
        AfterValidator(require_distinct),
    ] = ("text_encoder",)
    """Parts of the adapter: LoRA layers in the text encoder or the U-Net, or soft tokens before
    every prompt."""
    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = 50
    """Rank of the LoRA layers."""
    soft_tokens: Annotated[int, Field(ge=1, le=75, strict=True)] = 5
    """Number of soft tokens."""
    init_from: str | None = None
    """Adapter of the same base and components to start from: a folder or a Hub id."""


class SamplingSection(Section):
    """Sampling of images in training."""

    steps: _StepsRange = (19, 23)
    """K: scheduler steps, a number or a range `[low, high]` that is sampled from in each
    iteration."""
    guidance_scale: NonNegativeFloat = 7.5
    """s: scale of classifier-free guidance, or the scale that the denoiser embeds, as in FLUX.1
    dev. 0 to 1 disables classifier-free guidance; distilled models are used with 0."""
    size: PositiveInt | None = None
    """Width and height of the images in pixels; null is the default of the pipeline. Training on
    smaller images takes less memory and time."""
    antithetic: bool = False
    """Sample each prompt's noise in pairs z, -z; each is still standard normal. If the two images
    differ in class more often than by chance, as on the testbed, batch statistics and the loss have
    less sampling variance."""


class GradientSection(Section):
    """Computation of the gradient from the image to the adapter."""

    method: Literal["replay", "autograd", "naive", "truncated"] = "replay"
    """`replay` and `autograd` compute the paper's biased gradient: `replay` step by step,
    `autograd` in one graph, as in Algorithm 1. `naive` computes the exact gradient, `truncated` the
    exact gradient of the last steps. All but `replay` are for comparison: their memory grows with
    the number of steps."""
    standardize: Literal["paper", "exact", "none"] = "exact"
    """Weights of the steps in the biased gradient. `paper`: the paper's coefficients. `exact`:
    equal weights, which gave the least bias in this repository's benchmark. `none`: the weights
    that result from the scheduler."""
    replay_steps: PositiveInt | None = None
    """For `replay`: steps sampled for each image's gradient, weighted by their inverse
    probability; null uses all."""
    truncated_steps: PositiveInt | None = None
    """For `truncated`: number of last steps that the gradient goes through."""

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
            raise ValueError("method 'truncated' needs truncated_steps, the number of last steps")
        return self


class LossesSection(Section):
    """Weights of the losses other than the alignment loss, whose weight is 1 (section 4.1)."""

    semantics: NonNegativeFloat = 8.0
    """lambda_1: weight of the distance to the original image. It applies to images whose classes
    should not change; `attributes.N.semantics_changed` reduces it for the others."""
    face: NonNegativeFloat = 0.0
    """lambda_face: weight of the distance between a face and the nearest real face."""


class OptimizerSection(Section):
    """Optimizer, learning rate schedule and moving average."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its state in 8 bits; it needs the package bitsandbytes."""
    lr: PositiveFloat = 5e-5
    """Learning rate after the warm-up."""
    text_encoder_lr: PositiveFloat | None = None
    """Learning rate of the text encoder's layers and the soft tokens; null is `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to 0."""
    warmup: NonNegativeInt = 0
    """Iterations in which the learning rate rises linearly from 0."""
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.996
    """Decay of the moving average of the weights; the averaged weights are validated and saved. 0
    disables averaging."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Maximum gradient norm; null disables clipping."""


MEMORY_OPTIONS = ("decoder_checkpointing", "split_guidance", "gradient_checkpointing")
"""Keys of `train` that take less memory and more time, with the same result; the cheapest first."""


class TrainSection(Section):
    """Length of the training, memory, validation and checkpoints."""

    iterations: PositiveInt = 10_000
    """Number of updates. May be raised later to continue a run: training goes on from its last
    checkpoint. A learning rate that decays then follows the longer schedule, so it rises first."""
    prompts_per_iteration: PositiveInt = 1
    """Prompts per update, over all processes."""
    distinct_iterations: PositiveInt | None = None
    """Number of iterations with distinct prompts, noise and steps. Later ones repeat them and reuse
    cached judgements of the original images. Null: they never repeat."""
    micro_batch: PositiveInt | None = None
    """Images that the denoiser, the decoder and the judges process at a time, in each process; null
    for all. A smaller micro-batch takes more time and less memory, with the same result."""
    memory_budget: Gigabytes | None = None
    """Memory budget in GB per process, from which `micro_batch` is chosen when training starts: GPU
    memory including the CUDA context, or on the CPU all memory of the process. If one image does
    not fit, `decoder_checkpointing` is enabled, then `split_guidance`, then
    `gradient_checkpointing`. `auto`: what the GPU has free, less a margin; on the CPU, and if
    `micro_batch` is set, no budget."""
    decoder_checkpointing: bool = False
    """Gradient checkpointing in the decoder of the VAE: more time and less memory, with the same
    result. At 512 pixels in 16 bits it takes 1.6 GB per image instead of 3.1."""
    split_guidance: bool = False
    """In replay, evaluate the denoiser for the prompt and for the empty prompt one after the other,
    which halves its memory, with the same result."""
    gradient_checkpointing: bool = False
    """Gradient checkpointing in the denoiser: more time and less memory, with the same result."""
    channels_last: bool = False
    """Use the channels-last memory format in denoiser and decoder. Most GPUs are faster with it in
    half precision."""
    deterministic: bool = False
    """On a GPU, use the deterministic algorithms of PyTorch, cuDNN and cuBLAS, which are slower.
    Operations that have none, such as the gradient of resizing images, stay as they are and warn,
    so two runs may still differ by rounding. On the CPU, runs with the same number of threads are
    equal bit for bit without it."""
    compile: bool = False
    """Compile the denoiser with torch.compile. Pays off in long runs only: the first iterations
    take minutes."""
    device: Annotated[str, AfterValidator(checked_device)] = "auto"
    """`auto`: the GPU of the process, else MPS, else the CPU; for the testbed the CPU. `cuda`: the
    GPU of the process. `cuda:N`: that GPU. `mps`. `cpu`. A run may be resumed on another device."""
    seed: Seed = 0
    """Random seed of the prompts, the noise and the adapter's initial weights."""
    checkpoint_every: PositiveInt = 200
    """Iterations between checkpoints."""
    validate_every: PositiveInt | None = 200
    """Iterations between validations; null disables validation, and no best adapter is kept."""
    validation_images: PositiveInt = 24
    """Images per validation prompt."""
    clip_t_drop: NonNegativeFloat = 0.01
    """Maximum drop of CLIP-T below that of the base model. The best adapter is the one with the
    least validation bias among those within this limit."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    max_skipped: PositiveInt = 10
    """Number of successive updates that may be skipped because images or gradients are not finite
    before training stops. Each skipped update halves the learning rate for a while."""

    @model_validator(mode="after")
    def _check_memory(self) -> "TrainSection":
        if self.micro_batch is not None and isinstance(self.memory_budget, float | int):
            raise ValueError(
                f"memory_budget chooses micro_batch, got both ({self.memory_budget:g} and "
                f"{self.micro_batch}): set one of them to null, or leave it out"
            )
        return self


class EvaluationSection(Section):
    """Evaluation of the finished adapter."""

    split: str = "test"
    """Split of the prompt sets."""
    images_per_prompt: TwoOrMore = 60
    """Images per prompt."""
    steps: PositiveInt = 25
    """Scheduler steps."""
    guidance_scale: NonNegativeFloat = 7.5
    """s: scale of guidance, as for `sampling.guidance_scale`."""
    size: PositiveInt | None = None
    """Width and height of the images in pixels; null is the default of the pipeline."""
    seed: NonNegativeInt = 0
    """Random seed of the noise, which is the same with and without the adapter."""
    models: EvaluationModelsSection = EvaluationModelsSection()
    """The models that judge images; none of them should be used in training."""


class RunConfig(Section):
    """A recipe."""

    base: BaseSection
    attributes: Annotated[tuple[AttributeSection, ...], Field(min_length=1)]
    people: People = "largest"
    """Faces of an image that count, in training and in evaluation: only the `largest`, or `all`.
    The target shares are shares of these faces. Ignored for attributes of the whole image."""
    prompts: PromptsSection
    models: ModelsSection = ModelsSection()
    adapter: AdapterSection = AdapterSection()
    sampling: SamplingSection = SamplingSection()
    gradient: GradientSection = GradientSection()
    losses: LossesSection = LossesSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracker: Literal[
        "tensorboard",
        "wandb",
        "trackio",
        "mlflow",
        "comet_ml",
        "swanlab",
        "aim",
        "clearml",
        "dvclive",
        "none",
    ] = "none"
    """Experiment tracker of accelerate for curves and sample images, in addition to `events.jsonl`
    and `samples/`. Its package must be installed, and be logged in if it needs an account."""
    output: Annotated[str, Field(min_length=1)]
    """Run folder."""

    @classmethod
    def load(cls, recipe: str | Path, overrides: Overrides = ()) -> "RunConfig":
        """Read a recipe, merge it into the one that it extends, and apply overrides.

        Args:
            recipe: a YAML file, or the name of a shipped recipe.
            overrides: strings `key=value`, with a path with dots as key and a YAML value
                (`train.iterations=10`, `attributes.0.target=[.5,.5]`), or the same as a mapping.

        Raises:
            ValueError: no such recipe, an unknown key or an invalid value. The message is one
                sentence that says what is expected.
        """
        data = read_recipe(recipe, overrides)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"recipe '{recipe}': {sentences(error, cls)}") from error

    def to_yaml(self) -> str:
        """Write the whole recipe, including defaults, in a form that `load` reads back."""
        data = self.model_dump(mode="json")
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)

    def differences(self, other: "RunConfig") -> dict[str, tuple[Any, Any]]:
        """List the keys whose values differ: 'a.0.b' -> (ours, theirs).

        Except those that say where a run is, where it computes and how `setup` trains classifiers.
        """
        ours, theirs = (_flatten(x.model_dump(exclude=_NOT_OF_RUN)) for x in (self, other))
        keys = sorted({*ours, *theirs})
        pairs = {key: (ours.get(key), theirs.get(key)) for key in keys}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def balanced(self) -> list[Attribute]:
        """Return the attributes, with targets for subjects expanded to targets for prompts.

        Raises:
            ValueError: targets for a prompt or subject that is not in the prompt sets.
        """
        return [section.attribute(self.prompts.sets) for section in self.attributes]

    @property
    def embeddings_stay(self) -> bool:
        """Whether training can preserve the embeddings of kept prompts.

        It cannot with soft tokens, which shift all embeddings.
        """
        trained = self.adapter.components
        return "text_encoder" in trained and "soft_tokens" not in trained

    @model_validator(mode="after")
    def _check_steps(self) -> "RunConfig":
        low, high = self.sampling.steps
        if low > high:
            raise ValueError(f"sampling.steps must be [low, high], low <= high, got {[low, high]}")
        for key in ("replay_steps", "truncated_steps"):
            count = getattr(self.gradient, key)
            if (count or 0) > low:
                raise ValueError(
                    f"gradient.{key} must be at most sampling.steps ({low}), got {count}"
                )
        return self

    @model_validator(mode="after")
    def _check_learning_rates(self) -> "RunConfig":
        if self.optimizer.text_encoder_lr and set(self.adapter.components) == {"unet"}:
            raise ValueError(
                "optimizer.text_encoder_lr applies to text_encoder and soft_tokens, but "
                "adapter.components has neither: add one, or set optimizer.lr only"
            )
        return self

    @model_validator(mode="after")
    def _check_attributes(self) -> "RunConfig":
        names = [attribute.name for attribute in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"attributes must have different names, got {names}")
        for models in (self.models, self.evaluation.models):
            for attribute in self.attributes:
                models.classifier(attribute.attribute())
        if self.losses.face and self.models.face_detector == "none":
            raise ValueError(
                f"losses.face is {self.losses.face:g}, but models.face_detector 'none' finds no "
                "faces: choose a face detector, or set losses.face to 0"
            )
        if any(attribute.targets for attribute in self.attributes):
            self.balanced()
        return self

    @model_validator(mode="after")
    def _check_kept_prompts(self) -> "RunConfig":
        keep = self.prompts.keep
        if keep and not (
            keep.images or keep.prediction or (keep.embedding and self.embeddings_stay)
        ):
            raise ValueError(
                "prompts.keep trains nothing: set prompts.keep.images or prompts.keep.prediction "
                "above 0, or prompts.keep to null"
            )
        return self


_MODELS = {"classifiers": {"__all__": SETUP_KEYS}}
_NOT_OF_RUN: Any = {
    "output": True,
    "train": {"device"},
    "models": _MODELS,
    "evaluation": {"models": _MODELS},
}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested keys and indices to 'a.0.b'."""
    if not isinstance(tree, (dict, list, tuple)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value
        for name, inner in items
        for key, value in _flatten(inner, f"{prefix}.{name}".removeprefix(".")).items()
    }
