"""Statistics of single prompts, computed from the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.reports.estimate import rounded
from diffusers_fair.reports.records import Records, Settings

Confusion: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
MIN_COUNT = 2  # minimum number of faces, or images, of a prompt with class frequencies


@dataclass(frozen=True, kw_only=True)
class PromptBias:
    """Class frequencies of an attribute in the images of a prompt, and their bias."""

    frequencies: Mapping[str, float]
    bias: float
    noise_floor: float
    """Expected bias of a generator that is exactly on target, with as many images."""
    deviation: float | None
    """Deviation from the target; None if every target of the attribute is uniform."""
    corrected: float | None
    """Bias corrected for the classifier's errors; None if these are unknown."""

    def json(self) -> dict[str, Any]:
        """Return the JSON object in report.json."""
        optional = {"deviation": self.deviation, "corrected": self.corrected}
        return {
            "frequencies": dict(self.frequencies),
            "bias": self.bias,
            "floor": self.noise_floor,
            **{name: value for name, value in optional.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class PromptStatistics:
    """Statistics of a prompt; None for an attribute with too few faces, or a missing score."""

    prompt: str
    images: int
    faces: int
    """Number of images with a face."""
    attributes: Mapping[str, PromptBias | None]
    """By attribute and joint attribute."""
    scores: Mapping[str, float | None]

    @property
    def face_rate(self) -> float | None:
        """Share of images with a face; None without images."""
        return self.faces / self.images if self.images else None

    def json(self) -> dict[str, Any]:
        """Return the JSON object in report.json."""
        return {
            "prompt": self.prompt,
            "images": self.images,
            "faces": self.faces,
            "attributes": {name: bias and bias.json() for name, bias in self.attributes.items()},
            "scores": dict(self.scores),
        }


def prompt_statistics(
    settings: Settings, records: Records, confusion: Confusion
) -> list[PromptStatistics]:
    """Compute the statistics of every prompt.

    The frequencies of a prompt need two faces, because the class of a single face says nothing
    about the shares.

    Args:
        settings: settings of the evaluation.
        records: records of all images.
        confusion: attribute -> confusion matrix (K, K) of its classifier, if known.
    """
    counts = counts_by_prompt(settings, records)
    rates = error_rates(settings, confusion)
    statistics = []
    for i, prompt in enumerate(settings.prompts):
        of_prompt = records.prompt == i
        statistics.append(
            PromptStatistics(
                prompt=prompt,
                images=int(of_prompt.sum()),
                faces=int(records.found[of_prompt].sum()),
                attributes={
                    a.name: _prompt_bias(a, prompt, counts[a.name][i], rates.get(a.name))
                    for a in settings.measured()
                },
                scores={k: mean_of_finite(v[of_prompt]) for k, v in records.scores.items()},
            )
        )
    return statistics


def counts_by_prompt(settings: Settings, records: Records) -> dict[str, np.ndarray]:
    """Count the perceived classes: attribute or joint -> (prompts, classes).

    An attribute of whole images counts every image. An attribute of faces, alone or jointly with
    one of whole images, counts the images with a face or, with `people: all`, every face.
    """
    counts = {}
    for group, measured in zip(settings.groups(), settings.measured(), strict=True):
        prompt, classes = records.counted(group)  # (faces or images,)
        labels = metrics.joint_labels(classes, [len(a.classes) for a in group])
        counts[measured.name] = metrics.class_counts(
            labels, prompt, len(settings.prompts), len(measured.classes)
        )
    return counts


def error_rates(settings: Settings, confusion: Confusion) -> dict[str, np.ndarray]:
    """Attribute or joint -> error rates (K, K), if those of all its classifiers are known."""
    return {
        measured.name: metrics.joint_confusion([np.array(confusion[a.name]) for a in group])
        for group, measured in zip(settings.groups(), settings.measured(), strict=True)
        if all(a.name in confusion for a in group)
    }


def has_uneven_target(attribute: Attribute) -> bool:
    """Whether any target of the attribute is not uniform."""
    targets = [attribute.target, *attribute.targets.values()]
    return any(max(target) - min(target) > 1e-9 for target in targets)


def mean_of_finite(values: np.ndarray) -> float | None:
    """Average the values that are not NaN, and round; None without any."""
    values = values[np.isfinite(values)]
    return rounded(values.mean()) if len(values) else None


def _prompt_bias(
    attribute: Attribute, prompt: str, counts: np.ndarray, rates: np.ndarray | None
) -> PromptBias | None:
    """Compute the bias of a prompt from its counts (K,); None with fewer than `MIN_COUNT`."""
    n = int(counts.sum())
    if n < MIN_COUNT:
        return None
    shares, target = metrics.frequencies(counts), attribute.target_of(prompt)
    deviation = corrected = None
    if has_uneven_target(attribute):
        deviation = rounded(metrics.deviation(shares, target))
    if rates is not None:
        corrected = rounded(metrics.bias(metrics.corrected(shares, rates)))
    return PromptBias(
        frequencies=dict(zip(attribute.classes, map(rounded, shares), strict=True)),
        bias=rounded(metrics.bias(shares)),
        noise_floor=rounded(metrics.noise_floor(n, target)),
        deviation=deviation,
        corrected=corrected,
    )
