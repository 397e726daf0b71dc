"""The control prompts of an evaluation: how they are chosen and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair.evaluation.batches import Execution, judge_all
from diffusers_fair.evaluation.checks import (
    check_groups,
    check_people,
    checked_attributes,
    has_group,
)
from diffusers_fair.evaluation.generate import (
    generate_batch,
    prompt_key,
    takes_negative_prompts,
)
from diffusers_fair.evaluation.journal import BatchRecords
from diffusers_fair.evaluation.judge import judge_group_batch
from diffusers_fair.evaluation.quality import prompt_features
from diffusers_fair.families.base import execution_device
from diffusers_fair.paths import expand
from diffusers_fair.prompts.groups import PromptGroup, evaluation_groups
from diffusers_fair.prompts.wording import Wording
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.vision.judges import Judges


def with_groups(
    reference: Report,
    pipe: Any,
    groups: Sequence[PromptGroup],
    *,
    judges: Judges,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Measure the groups of control prompts that a base model's report lacks.

    Args:
        reference: the base model's report.
        pipe: the base model, without any adapter.
        groups: the groups that the report must have for a later evaluation. Prompts with a negative
            prompt are skipped if the pipeline has no parameter `negative_prompt`.
        judges: the models that judge the images.
        batch_size: images generated and judged together. Default: as for `evaluate`.
        out: folder of the later evaluation. It holds the journal, from which this function resumes,
            until that evaluation has ended.
        progress: whether to show a progress bar.

    Returns:
        The base model's report with all of these groups.

    Raises:
        ValueError: the reference's images come from a folder, the judges count other faces than
            the reference, a group of prompts cannot be measured, or another process is writing to
            the folder.
    """
    settings = reference.settings
    if settings.seed is None:
        raise ValueError(
            "the reference's images come from a folder, so control prompts cannot be added: "
            "evaluate the base model first"
        )
    checked_attributes(settings.attributes, judges)
    check_people(reference, judges.people)
    groups = supported_groups(groups, pipe)
    check_groups(groups, settings.attributes)
    execution = Execution(
        reference.label,
        judges,
        batch_size,
        None if out is None else expand(out),
        progress,
        execution_device(pipe),
    )
    journals = execution.journal_folder
    folder = None if journals is None else journals / "reference"
    with execution.lock():
        measured = {
            group.name: reference.groups[group.name].select(group)
            if has_group(reference, group)
            else measure_group(pipe, group, settings, execution, None, folder, reference.provenance)
            for group in groups
        }
    return replace(reference, groups=measured)


def measure_group(
    pipe: Any,
    group: PromptGroup,
    settings: Settings,
    execution: Execution,
    reference: Records | None,
    folder: Path | None,
    origin: Mapping[str, Any] | None,
) -> GroupReport:
    """Generate and judge the images of a group, with the sampling settings of neutral prompts.

    Args:
        pipe: pipeline that generates the images.
        group: the prompts.
        settings: settings of the neutral prompts.
        execution: how images are processed.
        reference: the base model's records of the same prompts and noise.
        folder: folder of the journals.
        origin: provenance of the reference.
    """
    group_settings = replace(
        settings,
        prompts=tuple(prompt.text for prompt in group.prompts),
        images_per_prompt=group.images_per_prompt,
    )
    texts = prompt_features(group_settings.prompts, execution.judges.clip)  # (P, d)
    sampling: dict[str, Any] = {
        "steps": group_settings.steps,
        "guidance_scale": group_settings.guidance_scale,
        "seed": group_settings.seed,
        "size": group_settings.size,
        "negatives": [prompt.negative for prompt in group.prompts],
        "keys": [prompt_key(prompt.text, prompt.negative) for prompt in group.prompts],
    }

    def judge(pairs: np.ndarray) -> BatchRecords:
        images = generate_batch(pipe, group_settings.prompts, pairs, **sampling)
        return judge_group_batch(images, group, group_settings, execution.judges, texts, reference)

    records, samples, _ = judge_all(
        None if folder is None else folder / group.name,
        {
            "group": asdict(group),
            "settings": group_settings.json(),
            "reference": origin,
        },
        {},
        [group.images_per_prompt] * len(group_settings.prompts),
        judge,
        execution,
        f"{group.name} prompts",
    )
    return GroupReport(
        group=group, attributes=settings.attributes, records=records, samples=samples
    )


def default_groups(settings: Settings, reference: Report | None) -> tuple[PromptGroup, ...]:
    """Choose the reference's groups or, without a reference, build groups from the class names.

    Raises:
        ValueError: the reference has no groups.
    """
    if reference is None:
        return evaluation_groups(settings.prompts, [Wording(a, {}) for a in settings.attributes])
    reports = [group.select_attributes(settings.attributes) for group in reference.groups.values()]
    if not reports:
        raise ValueError(
            "the reference measured no groups of control prompts: add them with "
            "evaluation.groups.with_groups, evaluate the base model again, or leave them out with "
            "groups=()"
        )
    return tuple(report.group for report in reports if report is not None)


def supported_groups(groups: Sequence[PromptGroup], pipe: Any) -> tuple[PromptGroup, ...]:
    """Drop prompts with a negative prompt if the pipeline does not support them."""
    if not any(prompt.negative for group in groups for prompt in group.prompts):
        return tuple(groups)
    if takes_negative_prompts(pipe):
        return tuple(groups)
    plain = [tuple(p for p in group.prompts if not p.negative) for group in groups]
    return tuple(
        replace(group, prompts=prompts)
        for group, prompts in zip(groups, plain, strict=True)
        if prompts or not group.prompts
    )
