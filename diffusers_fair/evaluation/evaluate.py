"""Measure a pipeline: generate, look, count. Knows nothing of how an adapter was trained."""

import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair import distributed
from diffusers_fair.attributes import Attribute, People
from diffusers_fair.evaluation.generate import (
    Pictures,
    bar,
    draw,
    pairs_of,
    prompt_key,
    takes_negative_prompts,
)
from diffusers_fair.evaluation.image_folder import picture_folder
from diffusers_fair.evaluation.journal import Journal, Seen
from diffusers_fair.evaluation.judge import look, look_at_group
from diffusers_fair.evaluation.quality import prompt_features
from diffusers_fair.prompts.groups import GROUPS, PromptGroup, evaluation_groups
from diffusers_fair.prompts.wording import Wording
from diffusers_fair.provenance import provenance
from diffusers_fair.reports.folder import FILE, load_report, save_report
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import SCORE_NAMES
from diffusers_fair.vision.judges import Judges, confusion_of

PARTIAL = ".partial"  # in a report's folder, as long as the evaluation runs


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
    batch_size: int = 24,
    groups: Sequence[PromptGroup] | None = None,
    reference: Report | None = None,
    label: str | None = None,
    out: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Generate images of prompts and measure their bias, and how well they fit (section 5.1).

    Beside them it measures prompts that leave an adapter nothing to change: whether images show
    what words ask for, and whether prompts without people stay as the base model draws them.

    With `out` it may be stopped at any time: the same call goes on where it was, repeats nothing
    and ends with the same report; and if it runs in several processes, as `accelerate launch` or
    `torchrun` start them, they share the batches, and each returns the whole report.

    Args:
        pipe: a text-to-image pipeline of diffusers, with or without an adapter.
        prompts: what to draw.
        attributes: what to count; where there are several their joint is counted, too.
        judges: the models that look at the images.
        images_per_prompt: images of each prompt; the fewer, the higher the floor of the bias. One
            tells nothing of bias.
        steps: scheduler steps.
        guidance_scale: of classifier-free guidance.
        seed: of the noise; the figures do not depend on the batch size.
        batch_size: images drawn and looked at together.
        groups: prompts that leave nothing to change, as `prompts.groups.evaluation_groups` makes
            them; () for none. Left out: those of the reference; without one, those made of
            `prompts` and the names of the attributes' classes. Prompts with a negative prompt are
            skipped if the pipeline has no parameter `negative_prompt`.
        reference: the base model's report with the same prompts, seed and sampling; needed for
            CLIP-I, DINO and the pictures of pairs. `with_groups` adds the groups that it lacks.
        label: what this is, as a column head; left out: "base", or "adapter" with a reference.
        out: folder that the report is saved to. If it holds this very report, that is loaded.
        model: what is measured and by what, in names; goes into the report's provenance. An
            evaluation that was stopped goes on only with the same.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: no prompts, no attributes, no images; a classifier that is missing or has other
            classes than its attribute; a group of prompts that cannot be measured; a reference that
            was not drawn from the same noise, counts other faces of an image, or lacks a group; a
            folder that holds another evaluation.
    """
    settings = Settings(
        prompts=_checked_prompts(prompts),
        attributes=_checked_attributes(attributes, judges),
        images_per_prompt=_positive(images_per_prompt, "images_per_prompt"),
        steps=_positive(steps, "steps"),
        guidance_scale=float(guidance_scale),
        seed=seed,
        people=judges.people,
    )
    if groups is None:
        groups = _usual_groups(settings, reference)
    groups = _accepted(groups, pipe)
    _check_groups(groups, settings.attributes)
    if reference is not None:
        _check_reference(reference, settings, groups)
    sampling = {"steps": steps, "guidance_scale": settings.guidance_scale, "seed": seed}
    about = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        **(model or {}),
    }
    run = _Run(
        judges, _positive(batch_size, "batch_size"), None if out is None else Path(out), progress
    )
    return _measure(
        settings,
        [settings.images_per_prompt] * len(settings.prompts),
        lambda pairs: draw(pipe, settings.prompts, pairs, **sampling),  # type: ignore[arg-type]
        run,
        pipe=pipe,
        groups=groups,
        reference=reference,
        label=label or ("base" if reference is None else "adapter"),
        about=about,
    )


def with_groups(
    reference: Report,
    pipe: Any,
    groups: Sequence[PromptGroup],
    *,
    judges: Judges,
    batch_size: int = 24,
    out: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Measure the groups of prompts that a base model's report lacks, to compare with it.

    Args:
        reference: the base model's report.
        pipe: the base model, without any adapter.
        groups: what a later evaluation is to measure. Prompts with a negative prompt are skipped
            if the pipeline has no parameter `negative_prompt`.
        judges: the models that look at the images.
        batch_size: images drawn and looked at together.
        out: the folder that the later evaluation is to save to; what is measured for it is kept
            there, so that it may be stopped, until that evaluation has ended.
        progress: whether to show a bar with the time left.

    Returns:
        The report with these groups.

    Raises:
        ValueError: images that were not drawn here; judges that count other faces than the
            reference's; a group of prompts that cannot be measured.
    """
    settings = reference.settings
    if settings.seed is None:
        raise ValueError(
            "the reference's images were not drawn here, so no others can be drawn in the same "
            "way: evaluate the base model first"
        )
    _checked_attributes(settings.attributes, judges)
    _check_people(reference, judges.people)
    groups = _accepted(groups, pipe)
    _check_groups(groups, settings.attributes)
    folder = None if out is None else Path(out) / PARTIAL / "reference"
    run = _Run(
        judges, _positive(batch_size, "batch_size"), None if out is None else Path(out), progress
    )
    found = {
        group.name: reference.groups[group.name].select(group)
        if _has(reference, group)
        else _measure_group(pipe, group, settings, run, None, folder, reference.provenance)
        for group in groups
    }
    return replace(reference, groups=found)


def audit(
    folder: str | Path,
    attributes: Sequence[Attribute],
    *,
    judges: Judges,
    batch_size: int = 24,
    label: str = "images",
    out: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Measure pictures made by anything, a folder for each prompt: their bias and CLIP-T.

    Prompts may have different numbers of pictures; one with fewer than two faces has no bias, and
    the report says so.

    Args:
        folder: as `folder.picture_folder` describes it.
        attributes: as for `evaluate`, like everything else.
        judges: the models that look at the images.
        batch_size: images looked at together.
        label: what this is, as a column head.
        out: folder that the report is saved to.
        model: what looks at the images, in names.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: a folder without pictures, or with one that cannot be read; otherwise as
            `evaluate`.
    """
    found = picture_folder(folder)
    counts = [len(files) for files in found.files]
    settings = Settings(
        prompts=found.prompts,
        attributes=_checked_attributes(attributes, judges),
        images_per_prompt=max(counts),
        people=judges.people,
    )
    return _measure(
        settings,
        counts,
        found.read,
        _Run(
            judges,
            _positive(batch_size, "batch_size"),
            None if out is None else Path(out),
            progress,
        ),
        label=label,
        about={"images": str(folder), "files": found.digest(), **(model or {})},
    )


@dataclass(frozen=True)
class _Run:
    """How all parts of an evaluation look at their images."""

    judges: Judges
    batch_size: int
    out: Path | None
    progress: bool

    @property
    def folder(self) -> Path | None:
        """Where their journals are."""
        return None if self.out is None else self.out / PARTIAL


def _measure(
    settings: Settings,
    counts: Sequence[int],
    read: Callable[[np.ndarray], Pictures],
    run: _Run,
    *,
    label: str,
    about: Mapping[str, Any],
    pipe: Any = None,
    groups: Sequence[PromptGroup] = (),
    reference: Report | None = None,
) -> Report:
    """Look at all images, `counts` of each prompt, that `read` gives for (prompt, image) pairs.

    Then at those of the groups, which `pipe` draws.
    """
    for name in run.judges.extra.keys() & {*SCORE_NAMES, "face_rate"}:
        raise ValueError(f"an extra score must not be called '{name}': that name is taken")
    facts: Mapping[str, Any] = provenance() | {"model": dict(about)}
    if run.out is not None and (run.out / FILE).exists():
        return _same(load_report(run.out), settings, groups, facts, run.out)
    asked = {"settings": settings.json(), "batch_size": run.batch_size, "label": label, **about}
    asked["reference"] = origin = None if reference is None else reference.provenance
    texts = prompt_features(settings.prompts, run.judges.clip)  # (P, d)
    before = None if reference is None else reference.records
    seen, facts = _seen(
        run.folder,
        asked,
        facts,
        pairs_of(counts, run.batch_size),
        lambda pairs: look(read(pairs), settings, run.judges, texts, before),
        run.progress,
    )
    records, samples = _joined(seen)
    measured = {}
    for group in groups:
        base = None if reference is None else reference.groups[group.name].select(group).records
        measured[group.name] = _measure_group(pipe, group, settings, run, base, run.folder, origin)
    report = Report(
        label=label,
        settings=settings,
        records=records,
        samples=samples,
        groups=measured,
        provenance=facts,
        confusion=confusion_of(settings.attributes, run.judges),
        reference=reference,
    )
    if run.out is not None:
        _finish(report, run.out)
    return report


def _measure_group(
    pipe: Any,
    group: PromptGroup,
    settings: Settings,
    run: _Run,
    reference: Records | None,
    folder: Path | None,
    origin: Mapping[str, Any] | None,
) -> GroupReport:
    """Draw the prompts of a group as the settings draw theirs, and look at the images.

    Args:
        pipe: draws them.
        group: the prompts.
        settings: of the neutral prompts.
        run: how images are looked at.
        reference: the base model's records of the same prompts and noise.
        folder: of the journals.
        origin: provenance of what they are compared with.
    """
    mine = replace(
        settings,
        prompts=tuple(prompt.text for prompt in group.prompts),
        images_per_prompt=group.images_per_prompt,
    )
    texts = prompt_features(mine.prompts, run.judges.clip)  # (P, d)
    negatives = [prompt.negative for prompt in group.prompts]
    keys = [prompt_key(prompt.text, prompt.negative) for prompt in group.prompts]
    sampling: dict[str, Any] = {"steps": mine.steps, "guidance_scale": mine.guidance_scale}
    sampling |= {"seed": mine.seed, "negatives": negatives, "keys": keys}

    def look_at(pairs: np.ndarray) -> Seen:
        images = draw(pipe, mine.prompts, pairs, **sampling)
        return look_at_group(images, group, mine, run.judges, texts, reference)

    seen, _ = _seen(
        None if folder is None else folder / group.name,
        {
            **{"group": asdict(group), "settings": mine.json()},
            **{"batch_size": run.batch_size, "reference": origin},
        },
        {},
        pairs_of([group.images_per_prompt] * len(mine.prompts), run.batch_size),
        look_at,
        run.progress,
    )
    records, samples = _joined(seen)
    return GroupReport(
        group=group, attributes=settings.attributes, records=records, samples=samples
    )


def _seen(
    folder: Path | None,
    asked: Mapping[str, Any],
    facts: Mapping[str, Any],
    batches: Sequence[np.ndarray],
    look_at: Callable[[np.ndarray], Seen],
    progress: bool,
) -> tuple[list[Seen], Mapping[str, Any]]:
    """Look at all batches, with a journal in the folder; the provenance is the first start's."""
    seen: MutableMapping[int, Seen] | Journal = {}
    if folder is not None:
        seen = _journal(folder, asked, facts)
        facts = seen.provenance
    _fill(seen, batches, look_at, shared=folder is not None, progress=progress)
    return [seen[i] for i in range(len(batches))], facts


def _journal(folder: Path, asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Journal:
    """The same for all processes; the first one starts it."""
    if distributed.rank() == 0:
        Journal.begin(folder, asked, facts)
    distributed.barrier()
    return Journal(folder)


def _fill(
    seen: MutableMapping[int, Seen] | Journal,
    batches: Sequence[np.ndarray],
    look_at: Callable[[np.ndarray], Seen],
    *,
    shared: bool,
    progress: bool,
) -> None:
    """Look at the batches that nobody has seen; shared: every process at its own."""
    first, step = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    mine = range(first, len(batches), step)
    with bar(sum(len(batches[i]) for i in mine), progress and first == 0) as advance:
        for i in mine:
            if i not in seen:
                seen[i] = look_at(batches[i])
            advance(len(batches[i]))
    if shared:
        distributed.barrier()


def _joined(parts: Sequence[Seen]) -> tuple[Records, dict[int, np.ndarray]]:
    """All records, and each sampled prompt's images."""
    samples: dict[int, list[np.ndarray]] = {}
    for part in parts:
        for (i, _), image in part.samples.items():
            samples.setdefault(i, []).append(image)
    records = Records.concatenate([part.records for part in parts])
    return records, {i: np.stack(images) for i, images in samples.items()}


def _finish(report: Report, out: Path) -> None:
    """Save the report once, after all processes have read what it is made of."""
    distributed.barrier()
    if distributed.rank() == 0:
        save_report(report, out)
        shutil.rmtree(out / PARTIAL)
    distributed.barrier()


def _same(
    report: Report,
    settings: Settings,
    groups: Sequence[PromptGroup],
    facts: Mapping[str, Any],
    out: Path,
) -> Report:
    """The report that is there, if it is the one that is asked for."""
    model = json.loads(json.dumps(facts["model"]))
    if report.settings != settings or report.provenance.get("model") != model:
        raise ValueError(f"'{out}' holds a report of something else already: choose another folder")
    if [group.group for group in report.groups.values()] != list(groups):
        raise ValueError(
            f"'{out}' holds a report with other groups of prompts already: choose another folder"
        )
    return report


def _usual_groups(settings: Settings, reference: Report | None) -> tuple[PromptGroup, ...]:
    """The reference's, so that the two can be compared; else of the classes' names.

    Raises:
        ValueError: the reference has none.
    """
    if reference is None:
        return evaluation_groups(settings.prompts, [Wording(a, {}) for a in settings.attributes])
    found = [group.select_attributes(settings.attributes) for group in reference.groups.values()]
    if not found:
        raise ValueError(
            "the reference measured no groups of prompts that leave nothing to change: add them "
            "with evaluation.with_groups, evaluate the base model again, or leave them out with "
            "groups=()"
        )
    return tuple(group.group for group in found if group is not None)


def _accepted(groups: Sequence[PromptGroup], pipe: Any) -> tuple[PromptGroup, ...]:
    """The groups without negative prompts, and those left empty, if the pipeline takes none."""
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


def _check_groups(groups: Sequence[PromptGroup], attributes: Sequence[Attribute]) -> None:
    classes = {a.name: a.classes for a in attributes}
    names = [group.name for group in groups]
    for group in groups:
        if group.name not in GROUPS or names.count(group.name) > 1:
            raise ValueError(
                f"groups of prompts are {', '.join(GROUPS)}, each once at most; got {names}"
            )
        if not group.prompts:
            raise ValueError(f"the group '{group.name}' has no prompts: leave it out")
        _positive(group.images_per_prompt, f"images_per_prompt of the group '{group.name}'")
        texts = [(prompt.text, prompt.negative) for prompt in group.prompts]
        for prompt in group.prompts:
            if texts.count((prompt.text, prompt.negative)) > 1:
                raise ValueError(
                    f"the group '{group.name}' has the prompt '{prompt.text}' more than once, and "
                    "its images would be the same: leave one out"
                )
            for name, asked in prompt.asks.items():
                if asked not in classes.get(name, ()):
                    raise ValueError(
                        f"the prompt '{prompt.text}' asks for '{asked}' of '{name}', and what is "
                        f"looked at is {classes}"
                    )


def _has(reference: Report, group: PromptGroup) -> bool:
    return group.name in reference.groups and reference.groups[group.name].covers(group)


def _checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got one string: use [{prompts!r}]")
    if not prompts:
        raise ValueError(
            "there are no prompts to evaluate: give one or more, for example "
            "prompt_set('testbed-occupations').prompts('test')"
        )
    return tuple(prompts)


def _checked_attributes(attributes: Sequence[Attribute], judges: Judges) -> tuple[Attribute, ...]:
    if not attributes:
        raise ValueError("there are no attributes to evaluate: give one or more")
    names = [a.name for a in attributes]
    if len(set(names)) < len(names):
        raise ValueError(f"attributes must have different names, got {names}")
    for attribute in attributes:
        if attribute.name not in judges.classifiers:
            raise ValueError(
                f"there is no classifier for attribute '{attribute.name}': judges.classifiers has "
                f"{sorted(judges.classifiers)}"
            )
        classes = judges.classifiers[attribute.name].classes
        if set(classes) != set(attribute.classes):
            raise ValueError(
                f"attribute '{attribute.name}' has classes {list(attribute.classes)}, but its "
                f"classifier knows {list(classes)}: they must be the same"
            )
    return tuple(attributes)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value


def _check_people(reference: Report, people: People) -> None:
    if reference.settings.people != people:
        raise ValueError(
            f"the reference '{reference.label}' counts the faces of an image by people "
            f"'{reference.settings.people}', the judges by '{people}': evaluate one of them again"
        )


def _check_reference(reference: Report, settings: Settings, groups: Sequence[PromptGroup]) -> None:
    reference.settings.check_same_noise(settings)
    _check_people(reference, settings.people)
    for group in groups:
        if not _has(reference, group):
            raise ValueError(
                f"the reference lacks images of the group of prompts '{group.name}': add them with "
                "evaluation.with_groups and the base model's pipeline, or leave them out with "
                "groups=()"
            )
