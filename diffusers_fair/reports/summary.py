"""The figures that follow from records, per prompt and over prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.reports.records import Records, Settings, number

Confusion: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
LEAST = 2  # faces, or images, that a prompt must have for its frequencies to tell anything


def counts_by_prompt(settings: Settings, records: Records) -> dict[str, np.ndarray]:
    """Attribute (and joint) -> how often each class was perceived, (prompts, classes).

    Of whole images all count; of faces, and of faces together with whole images, those with a face,
    or every face.
    """
    counts = {}
    for group, measured in zip(settings.groups(), settings.measured(), strict=True):
        prompt, seen = records.counted(group)  # (faces or images,)
        labels = metrics.joint_labels(seen, [len(a.classes) for a in group])
        counts[measured.name] = metrics.class_counts(
            labels, prompt, len(settings.prompts), len(measured.classes)
        )
    return counts


def prompt_figures(
    settings: Settings, records: Records, confusion: Confusion | None = None
) -> list[dict[str, Any]]:
    """Per prompt: images, faces, frequencies, bias and floor per attribute, mean scores.

    A figure that cannot be had, such as the bias of a prompt without faces, is None. One face tells
    nothing of frequencies: it is of one class whatever the generator's shares.

    Args:
        settings: what was asked for.
        records: what was seen.
        confusion: attribute -> (K, K) of its classifier, where that is known; adds "corrected".
    """
    counts = counts_by_prompt(settings, records)
    rates = _rates(settings, confusion or {})
    figures = []
    for i, prompt in enumerate(settings.prompts):
        mine = records.prompt == i
        figures.append(
            {
                "prompt": prompt,
                "images": int(mine.sum()),
                "faces": int(records.found[mine].sum()),
                "attributes": {
                    a.name: _prompt_bias(a, prompt, counts[a.name][i], rates.get(a.name))
                    for a in settings.measured()
                },
                "scores": {k: _mean_of_finite(v[mine]) for k, v in records.scores.items()},
            }
        )
    return figures


def summary_figures(
    settings: Settings, records: Records, confusion: Confusion | None = None
) -> dict[str, Any]:
    """Over prompts: face rate, bias per attribute and joint, scores; each with its interval.

    Means are over the prompts that have the figure, whose number is given; a figure that no prompt
    has is None. "deviation" is from the target, given where that is not uniform; "corrected" is the
    bias with the classifier's errors taken out, given where its confusion is known.

    Args:
        settings: what was asked for.
        records: what was seen.
        confusion: attribute -> (K, K) of its classifier.
    """
    counts = counts_by_prompt(settings, records)
    prompts = range(len(settings.prompts))
    biases, deviations = {}, {}
    for a in settings.measured():
        targets = np.array([a.target_of(prompt) for prompt in settings.prompts])  # (P, K)
        biases[a.name] = _bias_over_prompts(counts[a.name], targets)
        if _uneven(a):
            deviations[a.name] = _bias_over_prompts(counts[a.name], targets, of_target=True)
    rows = [records.prompt == i for i in prompts]
    per_prompt = {
        name: [_mean_of_finite(values[mine]) for mine in rows]
        for name, values in {"face_rate": records.found, **records.scores}.items()
    }
    spreads = {name: _spread([v for v in vs if v is not None]) for name, vs in per_prompt.items()}
    faces = [int(records.found[mine].sum()) for mine in rows]
    of_faces = any(a.of_faces for a in settings.attributes)
    counted = [int(records.faces[mine].sum()) for mine in rows]

    def named(chosen: Sequence[bool]) -> list[str]:
        return [settings.prompts[i] for i in prompts if chosen[i]]

    return {
        "prompts": len(prompts),
        "images": len(records.found),
        "faces": sum(faces),
        "prompts_without_images": named([not mine.any() for mine in rows]),
        "prompts_without_faces": named([of_faces and n == 0 for n in counted]),
        "prompts_with_one_face": named([of_faces and n == 1 for n in counted]),
        "face_rate": spreads.pop("face_rate"),
        "bias": biases,
        "deviation": deviations,
        "corrected": {
            name: _corrected_over_prompts(counts[name], matrix)
            for name, matrix in _rates(settings, confusion or {}).items()
        },
        "frequencies": {a.name: _class_spreads(a, counts[a.name]) for a in settings.measured()},
        "scores": spreads,
    }


def _rates(settings: Settings, confusion: Confusion) -> dict[str, np.ndarray]:
    """Attribute or joint -> error rates (K, K), of those whose classifiers tell them."""
    return {
        measured.name: metrics.joint_confusion([np.array(confusion[a.name]) for a in group])
        for group, measured in zip(settings.groups(), settings.measured(), strict=True)
        if all(a.name in confusion for a in group)
    }


def _prompt_bias(
    attribute: Attribute, prompt: str, counts: np.ndarray, rates: np.ndarray | None
) -> dict[str, Any] | None:
    """Frequencies, bias and floor of one prompt, counts (K,); None with fewer than `LEAST`."""
    n = int(counts.sum())
    if n < LEAST:
        return None
    shares, target = metrics.frequencies(counts), attribute.target_of(prompt)
    found = {
        "frequencies": dict(zip(attribute.classes, map(number, shares), strict=True)),
        "bias": number(metrics.bias(shares)),
        "floor": number(metrics.floor(n, target)),
    }
    if _uneven(attribute):
        found["deviation"] = number(metrics.deviation(shares, target))
    if rates is not None:
        found["corrected"] = number(metrics.bias(metrics.corrected(shares, rates)))
    return found


def _bias_over_prompts(
    counts: np.ndarray, targets: np.ndarray, *, of_target: bool = False
) -> dict[str, Any] | None:
    """Bias, or deviation from the target, over prompts with two faces or more; None without one.

    Counts and targets (P, K): each prompt has its own.
    """
    told = counts.sum(-1) >= LEAST
    seen, targets = counts[told], targets[told]
    centre = targets if of_target else None
    spread = _spread(metrics.deviation(metrics.frequencies(seen), centre))
    if spread is None:
        return None
    kinds, prompts = np.unique(
        np.column_stack([seen.sum(-1), targets]), axis=0, return_counts=True
    )  # images and target
    floors = [metrics.floor(int(n), t, t if of_target else None) for n, *t in kinds]
    moments = metrics.scatter_moments(seen, centre)
    interval = metrics.bootstrap_interval(moments, metrics.without_scatter)
    return {
        **spread,
        "interval_images": _pair(metrics.image_interval(seen, centre)),
        "floor": number(np.average(floors, weights=prompts)),
        "faces_per_prompt": number(seen.sum(-1).mean()),
        "without_scatter": {
            "mean": number(metrics.without_scatter(moments)),
            "interval": _pair(interval),
        },
    }


def _corrected_over_prompts(counts: np.ndarray, rates: np.ndarray) -> dict[str, Any] | None:
    """Bias of corrected frequencies over prompts with two faces or more; None without any."""
    seen = counts[counts.sum(-1) >= LEAST]
    if not len(seen):
        return None
    return _spread(metrics.bias(metrics.corrected(metrics.frequencies(seen), rates)))


def _uneven(attribute: Attribute) -> bool:
    """Whether a target is not uniform, so that the deviation from it is not the bias."""
    targets = [attribute.target, *attribute.targets.values()]
    return any(max(target) - min(target) > 1e-9 for target in targets)


def _class_spreads(attribute: Attribute, counts: np.ndarray) -> dict[str, Any] | None:
    """Class -> mean and std of its frequency over prompts with two faces or more."""
    seen = counts[counts.sum(-1) >= LEAST]
    if not len(seen):
        return None
    shares = metrics.frequencies(seen)
    return {
        name: {"mean": number(column.mean()), "std": number(column.std())}
        for name, column in zip(attribute.classes, shares.T, strict=True)
    }


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Mean, std (of these prompts, not an estimate for others), interval and number of values."""
    values = np.asarray(values, float)
    if not len(values):
        return None
    return {
        "mean": number(values.mean()),
        "std": number(values.std()),
        "interval": _pair(metrics.bootstrap_interval(values)),
        "prompts": len(values),
    }


def _mean_of_finite(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return number(values.mean()) if len(values) else None


def _pair(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [number(end) for end in interval]
