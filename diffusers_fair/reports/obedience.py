"""Figures of prompts that leave nothing to change, as tables show them, and what falls short."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_fair.prompts.groups import IMPLIED, NAMED, UNTOUCHED
from diffusers_fair.reports.groups import OBEYED, Estimate, GroupReport, GroupSummary

MARGIN = 0.05  # how far below the base model's figure needs no warning
SEEN, UNSEEN = "words of training", "unseen words"

Summaries = Mapping[str, GroupSummary]
"""Group -> its summary."""


@dataclass(frozen=True)
class Measure:
    """A figure of a group, and what tables call it."""

    group: str
    figure: str
    """Name of the figure in `GroupSummary`."""
    head: str
    part: str = ""
    """Which of the group's prompts: `SEEN`, `UNSEEN` or those of an attribute; all if empty."""
    base: float | None = None
    """What the base model itself would show, of figures that compare with it."""
    sign: int = 1
    """1 if more is better, -1 if less is."""

    @property
    def name(self) -> str:
        """The head, and which of the prompts."""
        return f"{self.head}, {self.part}" if self.part else self.head

    def of(self, summaries: Summaries) -> Estimate | None:
        """The figure; None for a gap."""
        summary = summaries.get(self.group)
        if summary is None:
            return None
        if self.figure == "attributes":
            return summary.attributes.get(self.part)
        return getattr(summary, self.figure)

    def by_prompt(self, report: GroupReport) -> np.ndarray:
        """The same of each prompt of the group, (P,); NaN for a gap."""
        values = report.by_prompt(OBEYED if self.part else self.figure)
        unseen = np.array([prompt.unseen for prompt in report.group.prompts])
        left_out = {SEEN: unseen, UNSEEN: ~unseen}.get(self.part, np.zeros(len(values), bool))
        return np.where(left_out, np.nan, values)


OBEDIENCE = {NAMED: "words obeyed", IMPLIED: "implied words obeyed"}
MEASURES = (
    *(
        Measure(group, figure, head, part)
        for group, head in OBEDIENCE.items()
        for figure, part in (("obeyed", ""), ("seen", SEEN), ("unseen", UNSEEN))
    ),
    Measure(UNTOUCHED, "dino", "untouched: DINO", base=1.0),
    Measure(UNTOUCHED, "clip_i", "untouched: CLIP-I", base=1.0),
    Measure(UNTOUCHED, "pixels", "untouched: pixel change", base=0.0, sign=-1),
)


def measures(all_summaries: Sequence[Summaries]) -> list[Measure]:
    """The measures that any of the summaries has a figure of."""
    return [m for m in MEASURES if any(m.of(summaries) for summaries in all_summaries)]


def by_attribute(summaries: Summaries) -> Iterator[Measure]:
    """The obedience of each attribute's words, where a group asks for several attributes."""
    for group, head in OBEDIENCE.items():
        names = summaries[group].attributes if group in summaries else {}
        if len(names) > 1:
            yield from (Measure(group, "attributes", head, name) for name in names)


@dataclass(frozen=True)
class Shortfall:
    """A figure that is worse than the base model's by more than the margin."""

    measure: Measure
    base: float
    found: float


def shortfalls(base: Summaries, found: Summaries) -> list[Shortfall]:
    """Where words are obeyed less than by the base model, or what is untouched has changed.

    Args:
        base: the base model's figures of the same prompts.
        found: the figures of what changes it.
    """
    short = []
    for measure in (*MEASURES, *by_attribute(found)):
        mine, theirs = measure.of(found), measure.of(base)
        before = measure.base if theirs is None else theirs.mean
        if mine is None or before is None:
            continue
        if round(measure.sign * (before - mine.mean), 6) > MARGIN:  # as many digits as figures have
            short.append(Shortfall(measure, before, mine.mean))
    return short


def warning(short: Sequence[Shortfall], label: str) -> str:
    """What falls short, in words; empty if nothing does."""
    if not short:
        return ""
    figures = "; ".join(f"{s.measure.name} {s.found:.3f}, base {s.base:.3f}" for s in short)
    return (
        f"{label} falls short of its base model by more than {100 * MARGIN:.0f} points where a "
        f"prompt leaves nothing to change: {figures}"
    )
