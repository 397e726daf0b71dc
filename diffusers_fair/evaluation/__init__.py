"""Measure a pipeline: generate, look, count. Knows nothing of how an adapter was trained."""

import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation import processes
from diffusers_fair.evaluation.folder import picture_folder
from diffusers_fair.evaluation.generate import Pictures, bar, draw, pairs_of
from diffusers_fair.evaluation.journal import Journal, Seen
from diffusers_fair.evaluation.look import Judges, confusion_of, look
from diffusers_fair.evaluation.pictures import pairs_picture
from diffusers_fair.evaluation.quality import prompt_features, recognition
from diffusers_fair.evaluation.records import Records, Settings
from diffusers_fair.evaluation.report import FILE, SCORE_NAMES, Report
from diffusers_fair.evaluation.table import table
from diffusers_fair.provenance import provenance

__all__ = [
    "Judges",
    "Records",
    "Report",
    "Settings",
    "audit",
    "evaluate",
    "pairs_picture",
    "recognition",
    "table",
]

PARTIAL = ".partial"  # in a report's folder, as long as the evaluation runs
SAME_NOISE = ("prompts", "images_per_prompt", "steps", "guidance_scale", "seed")


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
    reference: Report | None = None,
    label: str | None = None,
    out: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Generate images of prompts and measure their bias, and how well they fit (section 5.1).

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
        reference: the base model's report with the same prompts, seed and sampling; needed for
            CLIP-I, DINO and the pictures of pairs.
        label: what this is, as a column head; left out: "base", or "adapter" with a reference.
        out: folder that the report is saved to. If it holds this very report, that is loaded.
        model: what is measured and by what, in names; goes into the report's provenance. An
            evaluation that was stopped goes on only with the same.
        progress: whether to show a bar with the time left.

    Raises:
        ValueError: no prompts, no attributes, no images; a classifier that is missing or has other
            classes than its attribute; a reference that was not drawn from the same noise; a folder
            that holds another evaluation.
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
    if reference is not None:
        _check_reference(reference.settings, settings)
    sampling = {"steps": steps, "guidance_scale": settings.guidance_scale, "seed": seed}
    about = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "device": str(pipe.device),
        **(model or {}),
    }
    return _measure(
        settings,
        [settings.images_per_prompt] * len(settings.prompts),
        lambda pairs: draw(pipe, settings.prompts, pairs, **sampling),  # type: ignore[arg-type]
        judges,
        batch_size=batch_size,
        reference=reference,
        label=label or ("base" if reference is None else "adapter"),
        out=out,
        about=about,
        progress=progress,
    )


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
        judges,
        batch_size=batch_size,
        reference=None,
        label=label,
        out=out,
        about={"images": str(folder), "files": found.digest(), **(model or {})},
        progress=progress,
    )


def _measure(
    settings: Settings,
    counts: Sequence[int],
    read: Callable[[np.ndarray], Pictures],
    judges: Judges,
    *,
    batch_size: int,
    reference: Report | None,
    label: str,
    out: str | Path | None,
    about: Mapping[str, Any],
    progress: bool,
) -> Report:
    """Look at all images, `counts` of each prompt, that `read` gives for (prompt, image) pairs."""
    for name in judges.extra.keys() & {*SCORE_NAMES, "face_rate"}:
        raise ValueError(f"an extra score must not be called '{name}': that name is taken")
    batches = pairs_of(counts, _positive(batch_size, "batch_size"))
    facts = provenance() | {"model": dict(about)}
    if out is not None and (Path(out) / FILE).exists():
        return _same(Report.load(out), settings, facts, out)
    seen: MutableMapping[int, Seen] | Journal = {}
    if out is not None:
        asked = {"settings": settings.json(), "batch_size": batch_size, "label": label, **about}
        asked["reference"] = None if reference is None else reference.provenance
        seen = _journal(Path(out) / PARTIAL, asked, facts)
        facts = seen.provenance
    texts = prompt_features(settings.prompts, judges.clip)  # (P, d)
    _fill(
        seen,
        batches,
        lambda pairs: look(read(pairs), settings, judges, texts, reference),
        shared=out is not None,
        progress=progress,
    )
    report = _report(
        [seen[i] for i in range(len(batches))],
        label=label,
        settings=settings,
        provenance=facts,
        confusion=confusion_of(settings.attributes, judges),
        reference=reference,
    )
    if out is not None:
        _finish(report, Path(out))
    return report


def _journal(folder: Path, asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Journal:
    """The same for all processes; the first one starts it."""
    if processes.index() == 0:
        Journal.begin(folder, asked, facts)
    processes.meet()
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
    first, step = (processes.index(), processes.count()) if shared else (0, 1)
    mine = range(first, len(batches), step)
    with bar(sum(len(batches[i]) for i in mine), progress and first == 0) as advance:
        for i in mine:
            if i not in seen:
                seen[i] = look_at(batches[i])
            advance(len(batches[i]))
    if shared:
        processes.meet()


def _report(parts: Sequence[Seen], **rest: Any) -> Report:
    samples: dict[int, list[np.ndarray]] = {}
    for part in parts:
        for (i, _), image in part.samples.items():
            samples.setdefault(i, []).append(image)
    return Report(
        records=Records.concatenate([part.records for part in parts]),
        samples={i: np.stack(images) for i, images in samples.items()},
        **rest,
    )


def _finish(report: Report, out: Path) -> None:
    """Save the report once, after all processes have read what it is made of."""
    processes.meet()
    if processes.index() == 0:
        report.save(out)
        shutil.rmtree(out / PARTIAL)
    processes.meet()


def _same(report: Report, settings: Settings, facts: Mapping[str, Any], out: str | Path) -> Report:
    """The report that is there, if it is the one that is asked for."""
    model = json.loads(json.dumps(facts["model"]))
    if report.settings != settings or report.provenance.get("model") != model:
        raise ValueError(f"'{out}' holds a report of something else already: choose another folder")
    return report


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


def _check_reference(reference: Settings, settings: Settings) -> None:
    for name in SAME_NOISE:
        theirs, mine = getattr(reference, name), getattr(settings, name)
        if theirs != mine:
            shown = "" if name == "prompts" else f" ({theirs} there, {mine} here)"
            raise ValueError(
                f"the reference was made with other {name}{shown}: images can be compared only if "
                f"{', '.join(SAME_NOISE)} are the same"
            )
