"""The report of an evaluation: its records, and statistics computed from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.reports.groups import GroupReport, GroupSummary
from diffusers_fair.reports.measures import Shortfall, shortfalls
from diffusers_fair.reports.prompt_statistics import (
    Confusion,
    PromptStatistics,
    prompt_statistics,
)
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.summary import Summary, summarize


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """The settings of an evaluation, the records of its images, and their statistics."""

    label: str
    """Name of the evaluated model in tables."""
    settings: Settings
    records: Records
    samples: Mapping[int, np.ndarray] = field(repr=False)
    """Prompt -> its first images, (m, h, w, 3) uint8; for a few prompts."""
    provenance: Mapping[str, Any] = field(repr=False)
    """Command, versions, machine, time."""
    confusion: Confusion = field(default_factory=dict, repr=False)
    """Attribute -> confusion matrix of its classifier on held-out images, if known: counts, with a
    row for each true class and a column for each assigned class, in the attribute's order."""
    reference: "Report | None" = field(default=None, repr=False)
    """The base model's report that CLIP-I and DINO compare with; only its summaries are saved."""
    groups: Mapping[str, GroupReport] = field(default_factory=dict, repr=False)
    """Name -> report on a group of control prompts, whose images an adapter should not change."""

    @cached_property
    def summary(self) -> Summary:
        """Estimates over prompts."""
        return summarize(self.settings, self.records, self.confusion)

    @cached_property
    def prompts(self) -> list[PromptStatistics]:
        """Statistics of every prompt."""
        return prompt_statistics(self.settings, self.records, self.confusion)

    def group_summaries(self, like: "Report | None" = None) -> dict[str, GroupSummary]:
        """Summarize the groups of control prompts.

        Args:
            like: report to whose groups and prompts the groups are restricted. Groups that either
                report lacks are left out.
        """
        if like is None:
            return {name: group.summary for name, group in self.groups.items()}
        groups = {name: self.group_like(group) for name, group in like.groups.items()}
        return {name: group.summary for name, group in groups.items() if group is not None}

    def group_like(self, group: GroupReport) -> GroupReport | None:
        """Restrict this report's group of that name to the same prompts; None if it lacks any."""
        ours = self.groups.get(group.group.name)
        return ours.select(group.group) if ours is not None and ours.covers(group.group) else None

    def shortfalls(self, base: "Report | None" = None) -> list[Shortfall]:
        """List the measures by which control prompts are worse than with the base model.

        Args:
            base: the base model's report. Default: the reference.
        """
        base = base or self.reference
        return shortfalls(
            {} if base is None else base.group_summaries(self), self.group_summaries()
        )

    def select(
        self, attributes: Sequence[Attribute], images_per_prompt: int | None = None
    ) -> "Report":
        """Restrict the report to some attributes, or measure the same images by other targets.

        Args:
            attributes: evaluated attributes, possibly with other targets. Control prompts that ask
                for any other attribute are left out.
            images_per_prompt: number of first images of each neutral prompt to keep. Default: all.

        Raises:
            ValueError: an attribute was not evaluated or has other classes; the report has fewer
                images.
        """
        evaluated = {a.name: (a.classes, a.region) for a in self.settings.attributes}
        for attribute in attributes:
            if evaluated.get(attribute.name) != (attribute.classes, attribute.region):
                raise ValueError(
                    f"the report evaluated {evaluated}, not '{attribute.name}' with classes "
                    f"{attribute.classes} ({attribute.region}): evaluate again with that attribute"
                )
        available = self.settings.images_per_prompt
        count = available if images_per_prompt is None else images_per_prompt
        if count > available:
            raise ValueError(f"the report has {available} images of each prompt, not {count}")
        settings = replace(self.settings, attributes=tuple(attributes), images_per_prompt=count)
        groups = {name: g.select_attributes(attributes) for name, g in self.groups.items()}
        return replace(
            self,
            settings=settings,
            records=self.records.rows(self.records.image < count),
            groups={name: group for name, group in groups.items() if group is not None},
        )
