"""Evaluate a pipeline: generate images, judge them, and compute statistics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_fair import strict_json
from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation.batches import Execution, judge_all, save_once
from diffusers_fair.evaluation.checks import (
    check_groups,
    check_reference,
    check_sampling,
    checked_attributes,
    checked_prompts,
)
from diffusers_fair.evaluation.generate import ImageBatch, checked_size, generate_batch
from diffusers_fair.evaluation.groups import default_groups, measure_group, supported_groups
from diffusers_fair.evaluation.judge import judge_batch
from diffusers_fair.evaluation.quality import prompt_features
from diffusers_fair.families import check_components
from diffusers_fair.families.base import execution_device
from diffusers_fair.paths import expand
from diffusers_fair.prompts.groups import PromptGroup
from diffusers_fair.provenance import provenance
from diffusers_fair.reports.folder import FILE, load_report
from diffusers_fair.reports.records import Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import SCORE_NAMES
from diffusers_fair.vision.judges import Judges, confusion_of


def evaluate(
    pipe: Any,
    prompts: Sequence[str],
    attributes: Sequence[Attribute],
    *,
    judges: Judges,
    images_per_prompt: int = 60,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    size: int | None = None,
    batch_size: int | None = None,
    groups: Sequence[PromptGroup] | None = None,
    reference: Report | None = None,
    label: str | None = None,
    out: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Generate images of prompts and measure their bias and their quality (section 5.1).

    Also measures control prompts, whose images an adapter should not change: whether images show
    the class that a prompt names, and whether images of prompts without people stay those of the
    base model.

    With `out`, the evaluation can be stopped at any time: the same call resumes it and returns the
    same report. Processes that `accelerate launch` or `torchrun` starts share the batches, and each
    returns the whole report.

    Args:
        pipe: a text-to-image pipeline of diffusers, with or without an adapter.
        prompts: neutral prompts, which leave the classes of the attributes open.
        attributes: attributes to measure. Their joint distributions are measured, too.
        judges: the models that judge the images.
        images_per_prompt: images per prompt. Fewer images have a higher noise floor of the bias,
            and a single one has no bias.
        steps: scheduler steps.
        guidance_scale: scale of classifier-free guidance.
        seed: random seed of the noise. The images do not depend on the batch size.
        size: width and height of the images in pixels. Default: the pipeline's.
        batch_size: images generated and judged together. Default: 24 or, on a GPU, fewer if so many
            do not fit its memory.
        groups: groups of control prompts, as `prompts.groups.evaluation_groups` builds them; () for
            none. Default: those of the reference or, without one, groups built from `prompts` and
            the names of the classes. Prompts with a negative prompt are skipped if the pipeline has
            no parameter `negative_prompt`.
        reference: the base model's report with the same prompts, seed and sampling; needed for
            CLIP-I, DINO and the sample sheets. `with_groups` adds groups that it lacks.
        label: name of the model in tables. Default: "base", or "adapter" with a reference.
        out: folder that the report is saved to. If it already holds the report of the same
            evaluation, that report is loaded.
        model: names of the evaluated model and the judges, for the provenance. A stopped evaluation
            is resumed only with the same names.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the pipeline lacks a component; there are no prompts, attributes or images; a
            prompt is given twice; the steps, the guidance scale, the seed or the size is out of
            range; a classifier is missing or has other classes than its attribute; a group of
            prompts cannot be measured; the reference has other noise, counts other faces or lacks a
            group; the folder holds another report.
    """
    check_components(pipe)
    check_sampling(
        images_per_prompt=images_per_prompt, steps=steps, guidance_scale=guidance_scale, seed=seed
    )
    settings = Settings(
        prompts=checked_prompts(prompts),
        attributes=checked_attributes(attributes, judges),
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=float(guidance_scale),
        seed=seed,
        size=checked_size(pipe, size),
        people=judges.people,
    )
    if groups is None:
        groups = default_groups(settings, reference)
    groups = supported_groups(groups, pipe)
    check_groups(groups, settings.attributes)
    if reference is not None:
        check_reference(reference, settings, groups)
    sampling = {
        "steps": steps,
        "guidance_scale": settings.guidance_scale,
        "seed": seed,
        "size": settings.size,
    }
    return measure(
        settings,
        [settings.images_per_prompt] * len(settings.prompts),
        lambda pairs: generate_batch(pipe, settings.prompts, pairs, **sampling),  # type: ignore[arg-type]
        Execution(
            label or ("base" if reference is None else "adapter"),
            judges,
            batch_size,
            None if out is None else expand(out),
            progress,
            execution_device(pipe),
        ),
        model={
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            **({} if pipe.dtype == torch.float32 else {"dtype": str(pipe.dtype)}),
            **(model or {}),
        },
        pipe=pipe,
        groups=groups,
        reference=reference,
    )


def measure(
    settings: Settings,
    counts: Sequence[int],
    read: Callable[[np.ndarray], ImageBatch],
    execution: Execution,
    *,
    model: Mapping[str, Any],
    pipe: Any = None,
    groups: Sequence[PromptGroup] = (),
    reference: Report | None = None,
) -> Report:
    """Judge images of neutral prompts, then those of the groups of control prompts.

    Args:
        settings: settings of the evaluation.
        counts: number of images of each prompt.
        read: generates or reads a batch of images, given their prompt and image indices (n, 2).
        execution: how images are processed.
        model: where the images come from, for the provenance.
        pipe: pipeline that generates the images of the groups.
        groups: the control prompts.
        reference: the base model's report.

    Raises:
        ValueError: an extra score has a reserved name, the folder holds another report, or another
            process is writing to it.
    """
    judges, out = execution.judges, execution.out
    for name in judges.extra.keys() & {*SCORE_NAMES, "face_rate"}:
        raise ValueError(f"an extra score must not have the reserved name '{name}': rename it")
    with execution.lock():
        facts: Mapping[str, Any] = provenance(execution.device) | {"model": dict(model)}
        if out is not None and (out / FILE).exists():
            return _load_same(out, settings, groups, facts)
        origin = None if reference is None else reference.provenance
        texts = prompt_features(settings.prompts, judges.clip)  # (P, d)
        before = None if reference is None else reference.records
        records, samples, facts = judge_all(
            execution.journal_folder,
            {
                "settings": settings.json(),
                "label": execution.label,
                **model,
                "reference": origin,
            },
            facts,
            counts,
            lambda pairs: judge_batch(read(pairs), settings, judges, texts, before),
            execution,
            "neutral prompts",
        )
        measured = {}
        for group in groups:
            base = None if reference is None else reference.groups[group.name].select(group).records
            measured[group.name] = measure_group(
                pipe, group, settings, execution, base, execution.journal_folder, origin
            )
        report = Report(
            label=execution.label,
            settings=settings,
            records=records,
            samples=samples,
            groups=measured,
            provenance=facts,
            confusion=confusion_of(settings.attributes, judges),
            reference=reference,
        )
        if out is not None:
            save_once(report, out)
        return report


def _load_same(
    out: Path, settings: Settings, groups: Sequence[PromptGroup], facts: Mapping[str, Any]
) -> Report:
    """Load the report in the folder if it is that of the same evaluation."""
    report = load_report(out)
    model = strict_json.loads(strict_json.dumps(facts["model"]))
    stored = dict(report.provenance.get("model", {}))
    stored.pop("device", None)  # earlier versions stored it here
    if report.settings != settings or stored != model:
        raise ValueError(f"'{out}' already holds another report: choose another folder")
    if [group.group for group in report.groups.values()] != list(groups):
        raise ValueError(
            f"'{out}' already holds a report with other groups of prompts: choose another folder"
        )
    return report
