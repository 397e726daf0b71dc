"""The statistics of control prompts in tables, and where an adapter falls short of its base model.

Control prompts name or imply a class, or show nobody: an adapter should not change their images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_fair.prompts.groups import IMPLIED, NAMED, UNTOUCHED
from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.reports.groups import OBEYED, GroupReport, GroupSummary

MARGIN = 0.05  # by how much a measure may be worse than the base model's without a warning
_SEEN, _UNSEEN = "words of training", "unseen words"

Summaries = Mapping[str, GroupSummary]
"""Name of a group -> its summary."""


@dataclass(frozen=True)
class Measure:
    """A statistic of a group of prompts, and its name in tables."""

    group: str
    statistic: str
    """Name of the statistic in `GroupSummary`."""
    head: str
    part: str = ""
    """Part of the group: `_SEEN`, `_UNSEEN` or an attribute's name; empty for the whole group."""
    base: float | None = None
    """The base model's value, for statistics that compare with the base model."""
    sign: int = 1
    """1 if higher is better, -1 if lower is better."""

    @property
    def name(self) -> str:
        """The head and, if there is one, the part of the group."""
        return f"{self.head}, {self.part}" if self.part else self.head

    def estimate(self, summaries: Summaries) -> Estimate | None:
        """Look up the estimate; None if the summaries lack it."""
        summary = summaries.get(self.group)
        if summary is None:
            return None
        if self.statistic == "attributes":
            return summary.attributes.get(self.part)
        return getattr(summary, self.statistic)

    def by_prompt(self, report: GroupReport) -> np.ndarray:
        """Return the value of each prompt of the group, (P,); NaN if it has none."""
        values = report.by_prompt(OBEYED if self.part else self.statistic)
        unseen = np.array([prompt.unseen for prompt in report.group.prompts])
        left_out = {_SEEN: unseen, _UNSEEN: ~unseen}.get(self.part, np.zeros(len(values), bool))
        return np.where(left_out, np.nan, values)


_OBEDIENCE = {NAMED: "words obeyed", IMPLIED: "implied words obeyed"}
MEASURES = (
    *(
        Measure(group, statistic, head, part)
        for group, head in _OBEDIENCE.items()
        for statistic, part in (("obeyed", ""), ("seen", _SEEN), ("unseen", _UNSEEN))
    ),
    Measure(UNTOUCHED, "dino", "untouched: DINO", base=1.0),
    Measure(UNTOUCHED, "clip_i", "untouched: CLIP-I", base=1.0),
    Measure(UNTOUCHED, "pixels", "untouched: pixel change", base=0.0, sign=-1),
)


def measures(reports: Sequence[Summaries]) -> list[Measure]:
    """Select the measures that any of the reports has."""
    return [m for m in MEASURES if any(m.estimate(summaries) for summaries in reports)]


def attribute_measures(summaries: Summaries) -> Iterator[Measure]:
    """Yield one measure per attribute, for groups whose prompts ask for several attributes."""
    for group, head in _OBEDIENCE.items():
        names = summaries[group].attributes if group in summaries else {}
        if len(names) > 1:
            yield from (Measure(group, "attributes", head, name) for name in names)


@dataclass(frozen=True)
class Shortfall:
    """A measure that is worse than the base model's by more than the margin."""

    measure: Measure
    base: float
    value: float


def shortfalls(base: Summaries, changed: Summaries) -> list[Shortfall]:
    """List the measures of control prompts that are worse than the base model's.

    Args:
        base: summaries of the base model on the same prompts.
        changed: summaries of the changed model.
    """
    short = []
    for measure in (*MEASURES, *attribute_measures(changed)):
        after, before = measure.estimate(changed), measure.estimate(base)
        expected = measure.base if before is None else before.mean
        if after is None or expected is None:
            continue
        if round(measure.sign * (expected - after.mean), 6) > MARGIN:  # the precision of reports
            short.append(Shortfall(measure, expected, after.mean))
    return short


def warning(short: Sequence[Shortfall], label: str) -> str:
    """Describe the shortfalls in one sentence; empty without any."""
    if not short:
        return ""
    values = "; ".join(f"{s.measure.name} {s.value:.3f}, base {s.base:.3f}" for s in short)
    return (
        f"{label} falls short of its base model by more than {100 * MARGIN:.0f} points on prompts "
        f"that it should leave unchanged: {values}"
    )
