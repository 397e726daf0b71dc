"""Comparison of several reports on the same prompts, as in the paper's Table 1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import GROUPS, PromptGroup
from diffusers_fair.reports.columns import Column, columns, difference
from diffusers_fair.reports.estimate import DIGITS
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.report import Report


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a comparison."""

    label: str
    report: Report
    group: str = ""
    """Group of methods with the same goal; the best is marked within each group."""


def compare(entries: Sequence[Entry], against: str | None = None) -> "Comparison":
    """Compare reports on the attributes that all of them evaluated.

    Groups of control prompts are restricted to the prompts that all reports with that group share.

    Args:
        entries: two or more reports with the same prompts and numbers of images.
        against: label of the row that all others are tested against. Default: the first.

    Raises:
        ValueError: there are fewer than two reports, labels are duplicate or unknown, the prompts
            or numbers of images differ, or the reports have no attribute in common.
    """
    if len(entries) < 2:
        raise ValueError(f"expected two or more reports to compare, got {len(entries)}")
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two reports have the label '{label}': name them, as in LABEL=REPORT or "
                "GROUP/LABEL=REPORT"
            )
    if against is not None and against not in labels:
        raise ValueError(f"there is no report with the label '{against}': expected one of {labels}")
    first = entries[0]
    for entry in entries[1:]:
        _check_same(first, entry)
    shared = [a for a in first.report.settings.attributes if _all_evaluated(a, entries)]
    if not shared:
        raise ValueError(
            "the reports have no attribute with the same classes in common: evaluate again with "
            f"{', '.join(a.name for a in first.report.settings.attributes)}"
        )
    reports = _same_groups([_select(entry.report, shared) for entry in entries])
    rows = tuple(replace(e, report=report) for e, report in zip(entries, reports, strict=True))
    return Comparison(rows, against or first.label)


def _same_groups(reports: Sequence[Report]) -> list[Report]:
    """Restrict each group to the prompts and number of images that all reports with it share."""
    kept: list[dict[str, GroupReport]] = [{} for _ in reports]
    for name in GROUPS:
        available = [report.groups[name].group for report in reports if name in report.groups]
        texts = [{(p.text, p.negative) for p in group.prompts} for group in available]
        common = set.intersection(*texts) if texts else set()
        for report, groups in zip(reports, kept, strict=True):
            if name in report.groups and common:
                group_report = report.groups[name]
                prompts = [p for p in group_report.group.prompts if (p.text, p.negative) in common]
                prompts.sort(key=lambda p: (p.text, p.negative))  # so that prompts are paired
                count = min(group.images_per_prompt for group in available)
                groups[name] = group_report.select(PromptGroup(name, tuple(prompts), count))
    return [replace(report, groups=groups) for report, groups in zip(reports, kept, strict=True)]


def _select(report: Report, attributes: Sequence[Attribute]) -> Report:
    """Restrict a report to these attributes, and measure it by their targets."""
    unchanged = report.settings.attributes == tuple(attributes)
    return report if unchanged else report.select(attributes)


def _check_same(first: Entry, entry: Entry) -> None:
    """Check that two reports have the same prompts, counted faces and numbers of images."""
    ours, theirs = first.report.settings, entry.report.settings
    if ours.prompts != theirs.prompts:
        raise ValueError(
            f"'{entry.label}' was evaluated on other prompts than '{first.label}' "
            f"({len(theirs.prompts)} and {len(ours.prompts)}): only reports on the same prompts, "
            "in the same order, can be compared; evaluate one of them again"
        )
    if ours.people != theirs.people:
        raise ValueError(
            f"'{entry.label}' was evaluated with people '{theirs.people}', '{first.label}' with "
            f"people '{ours.people}': evaluate one of them again"
        )
    expected, got = (np.bincount(e.report.records.prompt) for e in (first, entry))
    if not np.array_equal(expected, got):
        raise ValueError(
            f"'{entry.label}' has {theirs.images_per_prompt} images of each prompt ({sum(got)} "
            f"in all), '{first.label}' has {ours.images_per_prompt} ({sum(expected)}): fewer "
            "images have a higher noise floor of the bias; evaluate with the same number"
        )


def _all_evaluated(attribute: Attribute, entries: Sequence[Entry]) -> bool:
    wanted = attribute.name, attribute.classes, attribute.region
    return all(
        any((a.name, a.classes, a.region) == wanted for a in entry.report.settings.attributes)
        for entry in entries
    )


@dataclass(frozen=True)
class Comparison:
    """The comparison of reports that `compare` returns."""

    entries: tuple[Entry, ...]
    against: str
    """Label of the row that the others are tested against."""

    @cached_property
    def columns(self) -> list[Column]:
        """All columns for which any of the reports has an estimate."""
        return columns([entry.report for entry in self.entries])

    @cached_property
    def groups(self) -> dict[str, list[Entry]]:
        """Rows by group, in order."""
        return {
            group: [entry for entry in self.entries if entry.group == group]
            for group in dict.fromkeys(entry.group for entry in self.entries)
        }

    def is_best(self, entry: Entry, column: Column) -> bool:
        """Whether no row of the entry's group is better, to the displayed precision."""
        estimates = [column.estimate(other.report) for other in self.groups[entry.group]]
        values = [column.sign * round(e.mean, DIGITS) for e in estimates if e]
        estimate = column.estimate(entry.report)
        if estimate is None or not column.sign or len(values) < 2:
            return False
        return column.sign * round(estimate.mean, DIGITS) == max(values)

    @cached_property
    def differences(self) -> dict[str, dict[str, metrics.PairedTest]]:
        """Label -> column head -> test of the difference from the row named by `against`."""
        base = next(entry for entry in self.entries if entry.label == self.against)
        return {
            entry.label: {c.head: difference(c, base.report, entry.report) for c in self.columns}
            for entry in self.entries
            if entry is not base
        }

    def json(self) -> dict[str, Any]:
        """Return the content of compare.json: the tables, and the provenance of the reports."""
        settings = self.entries[0].report.settings
        return {
            "prompts": len(settings.prompts),
            "images_per_prompt": settings.images_per_prompt,
            "attributes": {a.name: list(a.classes) for a in settings.attributes},
            "against": self.against,
            "rows": [
                {
                    "label": entry.label,
                    "group": entry.group,
                    "figures": {c.key: c.json(entry.report) for c in self.columns},
                    "best": [c.key for c in self.columns if self.is_best(entry, c)],
                    "difference": self._differences_json(entry.label),
                    "groups": {
                        name: asdict(summary)
                        for name, summary in entry.report.group_summaries().items()
                    },
                    "provenance": entry.report.provenance,
                }
                for entry in self.entries
            ],
        }

    def _differences_json(self, label: str) -> dict[str, Any]:
        tests = self.differences.get(label)
        return {} if tests is None else {c.key: asdict(tests[c.head]) for c in self.columns}
