"""Validation: measures bias and CLIP-T on the validation prompts, and finds the best adapter."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.reports.report import Report
from diffusers_fair.training.batch_gradient import BatchGradient


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Outcome of one validation."""

    bias: dict[str, float]
    """Attribute -> mean deviation from the target over the prompts; without attributes for which no
    image could be judged."""
    clip_t: float
    minimum_clip_t: float
    """CLIP-T of the original model minus the drop that the recipe allows."""
    is_best: bool
    """Whether the adapter is the best of all validations so far."""

    def metrics(self) -> dict[str, float]:
        """Return name -> value, as they are logged."""
        bias = {f"validation/{name}": value for name, value in self.bias.items()}
        return bias | {"validation/clip_t": self.clip_t}


class Validation:
    """Validates the adapter with training's judges.

    Args:
        gradient: what training uses: recipe, pipeline, adapter, judges and micro-batch.
        prompts: validation prompts.
    """

    def __init__(self, gradient: BatchGradient, prompts: list[str]):
        self.gradient = gradient
        self.config = gradient.config
        self.prompts = prompts
        self.attributes = self.config.balanced()
        self.best_bias: float | None = None
        self.base_clip_t: float | None = None  # of the original model; measured when needed

    def measure(self) -> Report:
        """Evaluate the pipeline as it is now, in training's micro-batches."""
        return evaluate(
            self.gradient.pipe,
            self.prompts,
            self.attributes,
            judges=self.gradient.objective.judges,
            batch_size=self.gradient.micro_batch,
            images_per_prompt=self.config.train.validation_images,
            steps=self.config.sampling.steps[1],
            guidance_scale=self.config.sampling.guidance_scale,
            seed=self.config.train.seed,
            size=self.config.sampling.size,
            groups=(),
            progress=False,
        )

    def judge(self, report: Report) -> ValidationResult:
        """Compare the adapter of a report with the best one so far."""
        biases = {a.name: _mean_bias(report, a.name) for a in self.attributes}
        bias = {name: value for name, value in biases.items() if value is not None}
        clip_t, minimum = _clip_t(report), self._minimum_clip_t()
        mean = sum(bias.values()) / len(bias) if bias else None
        is_best = mean is not None and clip_t >= minimum and _is_less(mean, self.best_bias)
        if is_best:
            self.best_bias = mean
        return ValidationResult(bias=bias, clip_t=clip_t, minimum_clip_t=minimum, is_best=is_best)

    def _minimum_clip_t(self) -> float:
        if self.base_clip_t is None:
            with self.gradient.adapter.disabled():
                self.base_clip_t = _clip_t(self.measure())
        return self.base_clip_t - self.config.train.clip_t_drop


def save_samples(report: Report, file: Path) -> np.ndarray:
    """Write an image with a row of samples for each sampled prompt, and return it (h, w, 3)."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(images), axis=1) for images in report.samples.values()]
    grid = np.concatenate(rows)
    Image.fromarray(grid).save(file)
    return grid


def _is_less(value: float, best: float | None) -> bool:
    return best is None or value < best


def _clip_t(report: Report) -> float:
    estimate = report.summary.scores["clip_t"]
    assert estimate is not None  # every image has one
    return estimate.mean


def _mean_bias(report: Report, attribute: str) -> float | None:
    estimate = report.summary.from_target(attribute)
    return None if estimate is None else estimate.mean
