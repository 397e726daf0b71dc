"""Evaluate a base model, and an adapter or a baseline against it: `diffusers-fair evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.adapters.repository import open_fair_adapter
from diffusers_fair.attributes import Attribute, People
from diffusers_fair.backends import registry
from diffusers_fair.backends.registry import choose_base_device, load_base, load_judges
from diffusers_fair.baselines import Baseline, Task
from diffusers_fair.baselines import baseline as find_baseline
from diffusers_fair.config.models import ModelsSection
from diffusers_fair.config.schema import EvaluationSection, RunConfig
from diffusers_fair.evaluation.audit import audit
from diffusers_fair.evaluation.checks import check_sampling
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.groups import with_groups
from diffusers_fair.loading import load_fair_adapter, unload_fair_adapter
from diffusers_fair.paths import expand
from diffusers_fair.prompts import prompt_set
from diffusers_fair.prompts.groups import PER_ATTRIBUTE, PromptGroup, evaluation_groups
from diffusers_fair.prompts.training_words import kept_sets, mark_unseen
from diffusers_fair.prompts.wording import attribute_sections, recipe_wording
from diffusers_fair.reports.folder import load_report, require_free
from diffusers_fair.reports.measures import warning
from diffusers_fair.reports.report import Report


@dataclass(frozen=True)
class Assessment:
    """The reports of a base model and of an adapter or a baseline, from the same noise."""

    base: Report
    changed: Report | None
    """Report with the adapter or the baseline; None if there is neither."""

    @property
    def warning(self) -> str:
        """Sentence on the control prompts that got worse; empty if none did."""
        if self.changed is None:
            return ""
        return warning(self.changed.shortfalls(self.base), self.changed.label)


@dataclass(frozen=True, kw_only=True)
class EvaluationDefaults:
    """The defaults of an evaluation: what it measures, and how."""

    section: EvaluationSection
    attributes: Mapping[str, Attribute]
    """Name -> attribute, for all that can be measured."""
    counted: Sequence[str]
    """Names of the attributes that are measured by default."""
    prompt_sets: Sequence[str]
    training_split: str
    """Split of the prompt sets that a baseline is fitted on."""
    training_models: ModelsSection
    """Judges that a baseline is fitted with."""
    attribute_sections: Sequence[dict[str, Any]]
    """The `attributes` section of a recipe, which has the words that name their classes."""
    untouched: str
    """Name of the prompt set without people."""
    people: People = "largest"
    kept: frozenset[str] = frozenset()
    """Names of the prompt sets in the recipe's `prompts.keep`."""
    dtype: str
    """Data type of the base model."""
    revision: str | None = None
    """Revision of the base model on the Hub."""

    @classmethod
    def of(cls, base: str, recipe: str | None) -> "EvaluationDefaults":
        """Build the defaults of a recipe or, without one, of a base that ships with its judges.

        Raises:
            ValueError: there is no recipe, and the base does not ship with judges.
        """
        if recipe is not None:
            return cls.of_config(base, RunConfig.load(recipe))
        usual = registry.base(base).usual_evaluation
        if usual is None:
            raise ValueError(
                f"there are no models to judge the images of '{base}': name a recipe that has them "
                "with --recipe"
            )
        shipped, sampling = usual(), registry.base(base).usual_sampling
        assert sampling is not None
        return cls(
            section=EvaluationSection(steps=sampling.steps, guidance_scale=sampling.guidance_scale),
            attributes=shipped.attributes,
            counted=list(shipped.attributes)[:1],
            prompt_sets=[shipped.prompt_set],
            training_split="train",
            training_models=ModelsSection(),
            attribute_sections=[
                {"name": a.name, "words": {c: shipped.words[c] for c in a.classes}}
                for a in shipped.attributes.values()
            ],
            untouched=registry.untouched_set(base),
            dtype=registry.base(base).usual_dtype,
        )

    @classmethod
    def of_config(cls, base: str, config: RunConfig) -> "EvaluationDefaults":
        """Build the defaults of a recipe."""
        root = config.model_dump(mode="json")
        attributes = {attribute.name: attribute for attribute in config.balanced()}
        return cls(
            section=config.evaluation,
            attributes=attributes,
            counted=list(attributes),
            prompt_sets=list(config.prompts.sets),
            training_split=config.prompts.train,
            training_models=config.models,
            attribute_sections=root["attributes"],
            untouched=registry.untouched_set(base),
            people=config.people,
            kept=kept_sets(root),
            dtype=config.base.dtype,
            revision=config.base.revision if config.base.model == base else None,
        )

    def choose(self, names: Sequence[str] | None) -> list[Attribute]:
        """Look up attributes by name. `None` gives the default ones.

        Raises:
            ValueError: a name is unknown.
        """
        for name in names or ():
            if name not in self.attributes:
                raise ValueError(
                    f"unknown attribute '{name}': expected one of {', '.join(self.attributes)}"
                )
        return [self.attributes[name] for name in (self.counted if names is None else names)]

    def prompts(self, name: str | None, split: str | None) -> list[str]:
        """Read a prompt set or a text file. `None` gives the default sets, or the default split."""
        names = self.prompt_sets if name is None else [name]
        split = self.section.split if split is None else split
        texts = (text for name in names for text in prompt_set(name).prompts(split))
        return list(dict.fromkeys(texts))  # sets may share prompts


def assess(
    base: str,
    *,
    out: str | Path,
    adapter: str | None = None,
    baseline: str | None = None,
    recipe: str | None = None,
    prompts: Sequence[str] | None = None,
    attributes: Sequence[str] | None = None,
    images_per_prompt: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    reference: str | Path | None = None,
    group_images: int | None = 4,
    respect_words: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    batch_size: int | None = None,
) -> Assessment:
    """Evaluate a base model, then an adapter or a baseline from the same noise; save the reports.

    Args:
        base: `testbed`, `testbed-flux`, a Hub id, a folder or a single `.safetensors` file.
        out: folder of the report. With an adapter or a baseline, the base model's report is saved
            in its subfolder `base`.
        adapter: folder or Hub id of an adapter.
        baseline: name of a published method, to evaluate instead of an adapter.
        recipe: its evaluation models judge the images, and it gives the defaults of the arguments
            below. Required for a base other than the testbeds.
        prompts: neutral prompts. Default: those of the recipe's test split.
        attributes: names of the attributes to measure. Default: those that the adapter balances,
            or else the recipe's.
        images_per_prompt: images per neutral prompt.
        steps: scheduler steps.
        guidance_scale: scale of classifier-free guidance.
        seed: random seed of the noise.
        reference: existing report of the base model, used instead of evaluating it again. It must
            have the same prompts and sampling, and at least as many images. Missing control
            prompts are generated.
        group_images: images per control prompt; None skips the control prompts.
        respect_words: disable the adapter for prompts that name a class it balances.
        device: device of all models, as in `choose_device`; `auto` is the CPU for the testbeds.
        dtype: data type of the base model, as in `choose_dtype`. Default: the recipe's or, without
            one, float32 for the testbeds and auto otherwise. The judges use float32.
        revision: commit, tag or branch of the base model on the Hub. Default: the recipe's, if this
            is the recipe's base model.
        adapter_revision: commit, tag or branch of the adapter on the Hub.
        batch_size: images generated and judged together. Default: as for `evaluate`.

    Raises:
        ValueError: the folder already holds a report; the device is not available; the arguments
            contradict one another; the adapter, the baseline, the recipe or an attribute is
            unknown; or as `evaluate`.
    """
    require_free(out)
    _check(adapter, baseline, reference, respect_words, adapter_revision)
    chosen = choose_base_device(base, device)
    method = None if baseline is None else find_baseline(baseline)
    defaults = EvaluationDefaults.of(base, recipe)
    section = defaults.section
    revision = defaults.revision if revision is None else revision
    opened = None if adapter is None else open_fair_adapter(adapter, adapter_revision)
    info = None if opened is None else opened.info
    if info is not None and attributes is None:
        counted = list(info.attributes)
    else:
        counted = defaults.choose(attributes)
    texts = defaults.prompts(None, None) if prompts is None else list(prompts)
    groups: tuple[PromptGroup, ...] = ()
    if group_images is not None:
        groups = control_groups(texts, counted, defaults, info, images_per_prompt=group_images)
    sampling: dict[str, Any] = {
        "images_per_prompt": (
            section.images_per_prompt if images_per_prompt is None else images_per_prompt
        ),
        "steps": section.steps if steps is None else steps,
        "guidance_scale": section.guidance_scale if guidance_scale is None else guidance_scale,
        "seed": section.seed if seed is None else seed,
    }
    check_sampling(**sampling)
    pipe = load_base(base, revision, defaults.dtype if dtype is None else dtype, chosen)
    model: dict[str, Any] = {"base": base, "recipe": recipe}
    model |= {} if revision is None else {"revision": revision}
    judges = load_judges(section.models, counted, chosen, defaults.people)
    options: dict[str, Any] = {"judges": judges, "batch_size": batch_size, **sampling}
    respect: dict[str, Any] = {"respect_words": True} if respect_words else {}
    if opened is not None:  # refuse an adapter that does not fit before the base is evaluated
        load_fair_adapter(pipe, opened, **respect)
        unload_fair_adapter(pipe)
    is_base_alone = adapter is None and baseline is None
    if reference is None:
        folder = out if is_base_alone else expand(out) / "base"
        before = evaluate(pipe, texts, counted, groups=groups, out=folder, model=model, **options)
    else:
        before = _reference(reference, texts, counted, options)
        judging = {name: options[name] for name in ("judges", "batch_size")}
        before = with_groups(before, pipe, groups, out=out, **judging)
    if is_base_alone:
        return Assessment(before, None)
    if opened is not None:
        load_fair_adapter(pipe, opened, **respect)
        model |= {"adapter": adapter, "adapter weights": opened.digest, **respect}
    else:
        assert method is not None
        pipe = _apply(method, pipe, counted, defaults, chosen, options)
        model |= {"baseline": baseline, "hyperparameters": dict(vars(method))}
    options |= {"reference": before, "label": baseline, "out": out}
    after = evaluate(pipe, texts, counted, groups=groups, model=model, **options)
    return Assessment(before, after)


def assess_images(
    folder: str | Path,
    *,
    out: str | Path,
    recipe: str | None,
    attributes: Sequence[str] | None = None,
    device: str = "auto",
    batch_size: int | None = None,
) -> Report:
    """Evaluate existing images from a folder, of whatever origin, and save the report.

    Args:
        folder: folder with a subfolder for each prompt; see `evaluation.image_folder`.
        out: folder of the report.
        recipe: its evaluation models judge the images.
        attributes: names of the attributes to measure. Default: the recipe's.
        device: device of the judges, as for `assess`.
        batch_size: images judged together. Default: as for `evaluate`.

    Raises:
        ValueError: the folder `out` already holds a report; there is no recipe; an attribute is
            unknown; the device is not available; or as `audit`.
    """
    require_free(out)
    if recipe is None:
        raise ValueError(
            f"there are no models to judge the images in '{folder}': name a recipe that has them "
            "with --recipe (for images of the testbed, a testbed recipe)"
        )
    config = RunConfig.load(recipe)
    chosen = choose_base_device(config.base.model, device)
    defaults = EvaluationDefaults.of_config("", config)
    counted = defaults.choose(attributes)
    judges = load_judges(defaults.section.models, counted, chosen, defaults.people)
    model = {"recipe": recipe}
    return audit(folder, counted, judges=judges, batch_size=batch_size, out=out, model=model)


def control_groups(
    prompts: Sequence[str],
    attributes: Sequence[Attribute],
    defaults: EvaluationDefaults,
    adapter: AdapterInfo | None = None,
    *,
    images_per_prompt: int = 4,
    per_attribute: int = PER_ATTRIBUTE,
) -> tuple[PromptGroup, ...]:
    """Build the groups of control prompts, and mark the words that training has not seen.

    Training has seen the words of the kept prompts: those of the adapter's recipe or, without an
    adapter, those of the evaluation's recipe.

    Args:
        prompts: neutral prompts.
        attributes: the measured attributes.
        defaults: defaults of the evaluation, which have the words that name the classes.
        adapter: the evaluated adapter.
        images_per_prompt: images per control prompt.
        per_attribute: prompts that name a class, per attribute.
    """
    trained: list[dict[str, Any]] = []
    kept = defaults.kept
    balanced = {section["name"] for section in defaults.attribute_sections}
    if adapter is not None:
        trained, kept = attribute_sections(adapter.recipe), kept_sets(adapter.recipe)
        balanced = {attribute.name for attribute in adapter.attributes}
    wordings = []
    for attribute in attributes:
        is_trained = bool(trained and kept) and attribute.name in balanced
        sections = trained if is_trained else [*trained, *defaults.attribute_sections]
        wordings.append(recipe_wording(attribute, sections))
    groups = evaluation_groups(
        prompts,
        wordings,
        untouched=defaults.untouched,
        images_per_prompt=images_per_prompt,
        per_attribute=per_attribute,
    )
    return mark_unseen(groups, kept, balanced)


def baseline_task(
    attributes: Sequence[Attribute], defaults: EvaluationDefaults, device: Any, **sampling: Any
) -> Task:
    """Build the task of a baseline: training prompts, training judges and sampling options."""
    return Task(
        wordings=[recipe_wording(a, defaults.attribute_sections) for a in attributes],
        prompts=defaults.prompts(None, defaults.training_split),
        judges=lambda: load_judges(defaults.training_models, attributes, device, defaults.people),
        **sampling,
    )


def _check(
    adapter: str | None,
    baseline: str | None,
    reference: str | Path | None,
    respect_words: bool,
    adapter_revision: str | None,
) -> None:
    if adapter is not None and baseline is not None:
        raise ValueError(
            "an adapter and a baseline are evaluated separately: leave out --adapter or --baseline"
        )
    if reference is not None and adapter is None and baseline is None:
        raise ValueError(
            "a reference needs an adapter or a baseline to compare: give --adapter or --baseline"
        )
    check_adapter_options(adapter, respect_words, adapter_revision)


def check_adapter_options(
    adapter: str | None, respect_words: bool, adapter_revision: str | None
) -> None:
    """Refuse options that need an adapter, or an adapter on the Hub.

    Raises:
        ValueError: there is none.
    """
    for option, is_given in {
        "--respect-words": respect_words,
        "--adapter-revision": adapter_revision is not None,
    }.items():
        if is_given and adapter is None:
            raise ValueError(f"{option} needs an adapter: name one with --adapter")
    if adapter is not None:
        registry.check_revision(adapter, adapter_revision)


def _reference(
    folder: str | Path,
    prompts: Sequence[str],
    attributes: Sequence[Attribute],
    options: Mapping[str, Any],
) -> Report:
    """Load the base model's report, restricted to the attributes and the number of images."""
    report = load_report(folder).select(attributes, options["images_per_prompt"])
    sampling = {k: v for k, v in options.items() if k not in ("judges", "batch_size")}
    report.settings.check_same_noise(replace(report.settings, prompts=tuple(prompts), **sampling))
    return report


def _apply(
    method: Baseline,
    pipe: Any,
    attributes: Sequence[Attribute],
    defaults: EvaluationDefaults,
    device: torch.device,
    options: Mapping[str, Any],
) -> Any:
    sampling = {name: options[name] for name in ("steps", "guidance_scale", "seed")}
    return method.apply(pipe, baseline_task(attributes, defaults, device, **sampling))
