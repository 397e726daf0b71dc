"""The summary of a report: estimates over its prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.reports.estimate import (
    Estimate,
    Interval,
    interval_from_json,
    rounded,
    rounded_interval,
)
from diffusers_fair.reports.prompt_statistics import (
    MIN_COUNT,
    Confusion,
    counts_by_prompt,
    error_rates,
    has_uneven_target,
    mean_of_finite,
)
from diffusers_fair.reports.records import Records, Settings

SCORE_NAMES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}


@dataclass(frozen=True)
class BiasEstimate(Estimate):
    """The mean bias over prompts, or the mean deviation from the target."""

    image_interval: Interval
    """95 % bootstrap interval of the mean for other images of the same prompts."""
    noise_floor: float
    """Expected value for a generator that is exactly on target, with as many images."""
    faces_per_prompt: float
    without_sampling_variance: Estimate
    """Estimate of the mean for infinitely many images; has no std."""

    @classmethod
    def from_json(cls, root: Mapping[str, Any] | None) -> "BiasEstimate | None":
        """Read what `json` wrote."""
        if root is None:
            return None
        without, n = root["without_scatter"], root["prompts"]
        low, high = root["interval_images"]
        return cls(
            mean=root["mean"],
            std=root["std"],
            interval=interval_from_json(root["interval"]),
            n=n,
            image_interval=(low, high),
            noise_floor=root["floor"],
            faces_per_prompt=root["faces_per_prompt"],
            without_sampling_variance=Estimate(
                without["mean"], None, interval_from_json(without["interval"]), n
            ),
        )

    def json(self) -> dict[str, Any]:
        """Return the JSON object that report.json holds in its summary."""
        without = self.without_sampling_variance.json()
        return {
            **super().json(),
            "interval_images": list(self.image_interval),
            "floor": self.noise_floor,
            "faces_per_prompt": self.faces_per_prompt,
            "without_scatter": {"mean": without["mean"], "interval": without["interval"]},
        }


Frequencies: TypeAlias = Mapping[str, Estimate]
"""Class -> mean frequency over prompts, without an interval."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Estimates over the prompts of a report.

    Each estimate is over the prompts that have the value; it is None if no prompt has it.
    """

    prompts: int
    images: int
    faces: int
    """Number of images with a face."""
    prompts_without_images: Sequence[str]
    prompts_without_faces: Sequence[str]
    prompts_with_one_face: Sequence[str]
    face_rate: Estimate | None
    """Share of images with a face."""
    bias: Mapping[str, BiasEstimate | None]
    """By attribute and joint attribute."""
    deviation: Mapping[str, BiasEstimate | None]
    """Deviation from the target, of attributes whose target is not uniform."""
    corrected: Mapping[str, Estimate | None]
    """Bias corrected for the classifiers' errors, of attributes for which these are known."""
    frequencies: Mapping[str, Frequencies | None]
    """Attribute or joint -> class -> its frequency."""
    scores: Mapping[str, Estimate | None]

    def from_target(self, attribute: str) -> BiasEstimate | None:
        """Return the deviation from target, which is the bias if the target is uniform."""
        return self.deviation.get(attribute, self.bias[attribute])

    @classmethod
    def from_json(cls, root: Mapping[str, Any]) -> "Summary":
        """Read what `json` wrote, or the part of it in `fair_adapter.json`."""
        bias = {name: BiasEstimate.from_json(part) for name, part in root["bias"].items()}
        deviation = root.get("deviation", {}).items()
        return cls(
            prompts=root["prompts"],
            images=root["images"],
            faces=root["faces"],
            prompts_without_images=root.get("prompts_without_images", ()),
            prompts_without_faces=root.get("prompts_without_faces", ()),
            prompts_with_one_face=root.get("prompts_with_one_face", ()),
            face_rate=Estimate.from_json(root.get("face_rate")),
            bias=bias,
            deviation={name: BiasEstimate.from_json(part) for name, part in deviation},
            corrected=_estimates_from_json(root.get("corrected", {})),
            frequencies={
                name: _frequencies_from_json(shares, bias.get(name))
                for name, shares in root.get("frequencies", {}).items()
            },
            scores=_estimates_from_json(root["scores"]),
        )

    def json(self) -> dict[str, Any]:
        """Return the JSON object in report.json."""
        return {
            "prompts": self.prompts,
            "images": self.images,
            "faces": self.faces,
            "prompts_without_images": list(self.prompts_without_images),
            "prompts_without_faces": list(self.prompts_without_faces),
            "prompts_with_one_face": list(self.prompts_with_one_face),
            "face_rate": self.face_rate and self.face_rate.json(),
            "bias": _estimates_json(self.bias),
            "deviation": _estimates_json(self.deviation),
            "corrected": _estimates_json(self.corrected),
            "frequencies": {
                name: shares and {c: {"mean": s.mean, "std": s.std} for c, s in shares.items()}
                for name, shares in self.frequencies.items()
            },
            "scores": _estimates_json(self.scores),
        }


def summarize(settings: Settings, records: Records, confusion: Confusion) -> Summary:
    """Compute the estimates over prompts.

    Args:
        settings: settings of the evaluation.
        records: records of all images.
        confusion: attribute -> confusion matrix (K, K) of its classifier, if known.
    """
    rows = [records.prompt == i for i in range(len(settings.prompts))]  # (n,) bool each
    counts = counts_by_prompt(settings, records)
    bias, deviation = {}, {}
    for a in settings.measured():
        targets = np.array([a.target_of(prompt) for prompt in settings.prompts])  # (P, K)
        bias[a.name] = _bias_over_prompts(counts[a.name], targets)
        if has_uneven_target(a):
            deviation[a.name] = _bias_over_prompts(counts[a.name], targets, from_target=True)
    rates = error_rates(settings, confusion)
    return Summary(
        prompts=len(settings.prompts),
        images=len(records.found),
        faces=int(records.found.sum()),
        **_gaps(settings, records, rows),
        face_rate=_score_over_prompts(records.found, rows),
        bias=bias,
        deviation=deviation,
        corrected={name: _corrected_over_prompts(counts[name], r) for name, r in rates.items()},
        frequencies={a.name: _frequencies(a, counts[a.name]) for a in settings.measured()},
        scores={name: _score_over_prompts(v, rows) for name, v in records.scores.items()},
    )


def _gaps(
    settings: Settings, records: Records, rows: Sequence[np.ndarray]
) -> dict[str, Sequence[str]]:
    """List the prompts without a bias, by reason."""
    needs_faces = any(a.of_faces for a in settings.attributes)
    faces = [int(records.faces[of_prompt].sum()) for of_prompt in rows]

    def named(chosen: Sequence[bool]) -> list[str]:
        return [
            prompt for prompt, is_chosen in zip(settings.prompts, chosen, strict=True) if is_chosen
        ]

    return {
        "prompts_without_images": named([not of_prompt.any() for of_prompt in rows]),
        "prompts_without_faces": named([needs_faces and n == 0 for n in faces]),
        "prompts_with_one_face": named([needs_faces and n == 1 for n in faces]),
    }


def _bias_over_prompts(
    counts: np.ndarray, targets: np.ndarray, *, from_target: bool = False
) -> BiasEstimate | None:
    """Estimate the bias, or the deviation from target, over the prompts with enough faces.

    Args:
        counts: counts of perceived classes, (P, K).
        targets: target shares of each prompt, (P, K).
        from_target: whether to measure from the target instead of from equal shares.
    """
    enough = counts.sum(-1) >= MIN_COUNT
    counts, targets = counts[enough], targets[enough]
    centre = targets if from_target else None
    estimate = Estimate.over(metrics.deviation(metrics.frequencies(counts), centre))
    if estimate is None:
        return None
    low, high = metrics.image_interval(counts, centre)
    moments = metrics.bias_moments(counts, centre)  # (P', 3)
    return BiasEstimate(
        **vars(estimate),
        image_interval=(rounded(low), rounded(high)),
        noise_floor=_mean_noise_floor(counts.sum(-1), targets, from_target),
        faces_per_prompt=rounded(counts.sum(-1).mean()),
        without_sampling_variance=Estimate(
            rounded(metrics.without_sampling_variance(*moments.T)),
            None,
            rounded_interval(
                metrics.bootstrap_interval(*moments.T, statistic=metrics.without_sampling_variance)
            ),
            estimate.n,
        ),
    )


def _mean_noise_floor(images: np.ndarray, targets: np.ndarray, from_target: bool) -> float:
    """Average the noise floors of prompts; computed once for equal images and targets."""
    kinds, prompts = np.unique(np.column_stack([images, targets]), axis=0, return_counts=True)
    floors = [metrics.noise_floor(int(n), t, t if from_target else None) for n, *t in kinds]
    return rounded(np.average(floors, weights=prompts))


def _corrected_over_prompts(counts: np.ndarray, rates: np.ndarray) -> Estimate | None:
    counts = counts[counts.sum(-1) >= MIN_COUNT]
    if not len(counts):
        return None
    return Estimate.over(metrics.bias(metrics.corrected(metrics.frequencies(counts), rates)))


def _frequencies(attribute: Attribute, counts: np.ndarray) -> Frequencies | None:
    counts = counts[counts.sum(-1) >= MIN_COUNT]
    if not len(counts):
        return None
    shares = metrics.frequencies(counts)
    return {
        name: Estimate(rounded(column.mean()), rounded(column.std()), None, len(shares))
        for name, column in zip(attribute.classes, shares.T, strict=True)
    }


def _score_over_prompts(values: np.ndarray, rows: Sequence[np.ndarray]) -> Estimate | None:
    """Average the values (n,) of all images per prompt, then over prompts."""
    means = [mean_of_finite(values[of_prompt]) for of_prompt in rows]
    return Estimate.over([mean for mean in means if mean is not None])


def _estimates_json(estimates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: estimate and estimate.json() for name, estimate in estimates.items()}


def _estimates_from_json(root: Mapping[str, Any]) -> dict[str, Estimate | None]:
    return {name: Estimate.from_json(part) for name, part in root.items()}


def _frequencies_from_json(
    root: Mapping[str, Any] | None, bias: BiasEstimate | None
) -> Frequencies | None:
    if root is None or bias is None:
        return None
    return {name: Estimate(s["mean"], s["std"], None, bias.n) for name, s in root.items()}
