"""The columns of a comparison: the estimates that are put side by side."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.reports.measures import Measure, measures
from diffusers_fair.reports.prompt_statistics import PromptStatistics
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import SCORE_NAMES, BiasEstimate


@dataclass(frozen=True, kw_only=True)
class Column:
    """An estimate that is compared between reports."""

    head: str
    """Name in tables."""
    sign: int
    """1 if higher is better, -1 if lower is better, 0 if neither."""
    estimate: Callable[[Report], Estimate | None]
    """Looks up the estimate of a report; None if the report lacks it."""
    by_prompt: Callable[[Report], np.ndarray]
    """Looks up the value of each prompt of a report, (P,); NaN if a prompt has none."""
    key: str
    """Name in compare.json."""

    def json(self, report: Report) -> dict[str, Any] | None:
        """Return the estimate as compare.json holds it."""
        estimate = self.estimate(report)
        return None if estimate is None else estimate.json()


@dataclass(frozen=True, kw_only=True)
class BiasColumn(Column):
    """The bias of an attribute, or its deviation from the target."""

    name: str
    """Name of the attribute or the joint."""
    from_target: bool = False
    estimate: Callable[[Report], BiasEstimate | None]

    def corrected(self, report: Report) -> Estimate | None:
        """Return the bias corrected for classifier errors; None for a deviation from target."""
        return None if self.from_target else report.summary.corrected.get(self.name)


class MeasureColumn(Column):
    """A measure of control prompts."""

    def json(self, report: Report) -> dict[str, Any] | None:
        """Return the estimate as compare.json holds it, in the format of control groups."""
        estimate = self.estimate(report)
        return None if estimate is None else asdict(estimate)


def columns(reports: Sequence[Report]) -> list[Column]:
    """List every column for which any of the reports has an estimate."""
    return [*bias_columns(reports), *score_columns(reports), *_measure_columns(reports)]


def bias_columns(reports: Sequence[Report]) -> list[BiasColumn]:
    """List the biases, then the deviations from targets that are not uniform."""
    biases = dict.fromkeys(name for report in reports for name in report.summary.bias)
    deviations = dict.fromkeys(name for report in reports for name in report.summary.deviation)
    return [*map(_bias_column, biases), *map(_deviation_column, deviations)]


def score_columns(reports: Sequence[Report]) -> list[Column]:
    """List the face rate and the scores, extra scores before the standard ones."""
    scores = dict.fromkeys(name for report in reports[::-1] for name in report.summary.scores)
    ordered = sorted(scores, key=lambda name: name in SCORE_NAMES)
    return [_face_rate_column(), *map(_score_column, ordered)]


def _measure_columns(reports: Sequence[Report]) -> list[Column]:
    """List the measures of control prompts."""
    return [_measure_column(m) for m in measures([r.group_summaries() for r in reports])]


def difference(column: Column, first: Report, second: Report) -> metrics.PairedTest:
    """Test the difference of the second report from the first, paired by prompt."""
    before, after = column.by_prompt(first), column.by_prompt(second)
    if not len(before) or not len(after):  # one of them lacks the group of prompts
        return metrics.paired_test([], [])
    return metrics.paired_test(before, after)


def _bias_column(name: str) -> BiasColumn:
    def value(prompt: PromptStatistics) -> float | None:
        bias = prompt.attributes[name]
        return None if bias is None else bias.bias

    return BiasColumn(
        name=name,
        key=f"bias, {name}",
        head=f"bias, {name}",
        sign=-1,
        estimate=lambda report: report.summary.bias.get(name),
        by_prompt=_by_prompt(value),
    )


def _deviation_column(name: str) -> BiasColumn:
    def value(prompt: PromptStatistics) -> float | None:
        bias = prompt.attributes[name]
        return None if bias is None else bias.deviation

    return BiasColumn(
        name=name,
        from_target=True,
        key=f"off target, {name}",
        head=f"deviation from target, {name}",
        sign=-1,
        estimate=lambda report: report.summary.deviation.get(name),
        by_prompt=_by_prompt(value),
    )


def _face_rate_column() -> Column:
    return Column(
        key="faces",
        head="images with a face",
        sign=0,
        estimate=lambda report: report.summary.face_rate,
        by_prompt=_by_prompt(lambda prompt: prompt.face_rate),
    )


def _score_column(name: str) -> Column:
    head = SCORE_NAMES.get(name, name)
    return Column(
        key=head,
        head=head,
        sign=1,
        estimate=lambda report: report.summary.scores.get(name),
        by_prompt=_by_prompt(lambda prompt: prompt.scores.get(name)),
    )


def _measure_column(measure: Measure) -> Column:
    def by_prompt(report: Report) -> np.ndarray:
        group = report.groups.get(measure.group)
        return np.array([]) if group is None else measure.by_prompt(group)

    return MeasureColumn(
        key=measure.name,
        head=measure.name,
        sign=measure.sign,
        estimate=lambda report: measure.estimate(report.group_summaries()),
        by_prompt=by_prompt,
    )


def _by_prompt(
    value: Callable[[PromptStatistics], float | None],
) -> Callable[[Report], np.ndarray]:
    """Make a function that collects a value over the prompts of a report; None becomes NaN."""
    return lambda report: np.array([value(prompt) for prompt in report.prompts], float)
