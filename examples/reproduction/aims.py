"""Acceptance limits of the experiments, and the metrics that miss them."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.reports.groups import summaries_from_json
from diffusers_fair.reports.summary import Summary

Range = tuple[float, float]

BIAS = {  # experiment -> attribute -> maximum bias
    "testbed-gender": {"gender": 0.15},
    "testbed-race": {"race": 0.10},
    "testbed-gender-race": {"gender": 0.15, "race": 0.09, "gender x race": 0.05},
    "testbed-gender-race-age": {"gender": 0.16, "race": 0.10, "gender x race": 0.06},
    "testbed-prefix": {"gender": 0.24},
    "testbed-unet": {"gender": 0.20},
    "testbed-text-encoder-unet": {"gender": 0.15},
}
HALVED = ("gender", "race")  # in all other experiments, at most half of the base model's bias
OLD: dict[str, dict[str, Range]] = {
    "testbed-gender-race-age": {"old, mean": (0.22, 0.28), "old, std": (0.0, 0.09)}
}
STRICT = ("testbed-gender", "testbed-race", "testbed-gender-race", "testbed-gender-race-age")
LOST = {True: (0.03, 0.08, 0.97), False: (0.05, 0.10, 0.95)}
"""Whether the experiment is strict -> maximum loss of obedience to seen and to unseen words, and
minimum similarity of untouched images."""
WORDS = {  # metric -> group of control prompts and name in its summary
    "named, seen": ("named", "seen"),
    "named, unseen": ("named", "unseen"),
    "implied": ("implied", "obeyed"),
    "untouched, DINO": ("untouched", "dino"),
    "untouched, pixels": ("untouched", "pixels"),
}
KEPT = {"faces": 0.02, "context": 0.03, "CLIP-T": 0.01}  # maximum loss against the base model

CAUSES = {  # (experiment, metric) -> cause, as trainings with other settings have shown
    ("testbed-gender", "bias, gender"): "the text encoder alone has to tell neutral prompts from "
    "kept ones: keeping four times as weakly gains little; without kept prompts the limit is "
    "nearly met, but words that name a class are no longer obeyed",
    ("testbed-gender-race", "bias, gender x race"): "unseen occupations lean to male more than "
    "those of training; the gap is smaller than the difference between two trainings",
    ("testbed-prefix", "bias, gender"): "differences between prompts: a longer training or a "
    "lower weight of similarity do not help, a higher learning rate diverges",
}


def missed(experiment: str, report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield rows: experiment, metric, value, limit, cause."""
    reference = report["reference"]
    values = means(Summary.from_json(report["summary"])) | kept_words(report)
    base = means(Summary.from_json(reference["summary"])) | kept_words(reference)
    for name, (low, high) in limits(experiment, base).items():
        if name in values and not low <= values[name] <= high:
            cause = CAUSES.get((experiment, name), "not known")
            yield [experiment, name, f"{values[name]:.4f}", range_text(low, high), cause]


def limits(experiment: str, base: Mapping[str, float]) -> dict[str, Range]:
    """Return metric -> allowed range, given the base model's means."""
    seen, unseen, dino = LOST[experiment in STRICT]
    lost = {"named, seen": seen, "named, unseen": unseen, **KEPT}
    most = BIAS.get(experiment) or {name: base[f"bias, {name}"] / 2 for name in HALVED}
    return {
        **{f"bias, {name}": (0.0, limit) for name, limit in most.items()},
        **OLD.get(experiment, {}),
        **{name: (base[name] - loss, 1.0) for name, loss in lost.items() if name in base},
        "untouched, DINO": (dino, 1.0),
    }


def kept_words(report: Mapping[str, Any]) -> dict[str, float]:
    """Return metric of control prompts -> mean, of a report or its reference."""
    summaries = summaries_from_json(report)
    estimates = {
        name: getattr(summaries[group], statistic)
        for name, (group, statistic) in WORDS.items()
        if group in summaries
    }
    return {name: estimate.mean for name, estimate in estimates.items() if estimate is not None}


def means(summary: Summary) -> dict[str, float]:
    """Return metric -> mean, by the names in the table of experiments."""
    scores = {"context": summary.scores.get("context"), "CLIP-T": summary.scores.get("clip_t")}
    biases = {f"bias, {name}": bias for name, bias in summary.bias.items()}
    return {
        **{name: estimate.mean for name, estimate in (biases | scores).items() if estimate},
        "old, mean": old(summary).mean,
        "old, std": old(summary).std or 0.0,
        "faces": face_rate(summary).mean,
    }


def old(summary: Summary) -> Estimate:
    """Return the share of people who are perceived as old."""
    frequencies = summary.frequencies["age"]
    assert frequencies is not None
    return frequencies["old"]


def face_rate(summary: Summary) -> Estimate:
    """Return the share of images with a face."""
    assert summary.face_rate is not None
    return summary.face_rate


def range_text(low: float, high: float) -> str:
    """Describe a range in words."""
    if low == 0:
        return f"at most {high:.4f}"
    return f"at least {low:.4f}" if high == 1 else f"{low:.4f} to {high:.4f}"
