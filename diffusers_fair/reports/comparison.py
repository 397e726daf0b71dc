"""Several reports on the same prompts in one table, as the paper's Table 1."""

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import GROUPS, PromptGroup
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.obedience import Measure, measures
from diffusers_fair.reports.report import GAP, SCORE_NAMES, Report

FILES = ("compare.html", "compare.json", "compare.md")
BIASES = ("bias", "deviation")  # kinds of columns that have a floor
DIGITS = 3  # shown; what is equal to that many is tied


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the comparison."""

    label: str
    report: Report
    group: str = ""
    """Rows of the same group compete with one another: what they set out to balance."""


@dataclass(frozen=True)
class Column:
    """A figure of the reports: where it is in their summary, and which way is better."""

    kind: str
    """"bias", "deviation", "scores", "face_rate" or "groups"."""
    name: str
    """Of the attribute, the joint or the score."""
    head: str
    sign: int
    """1 where more is better, -1 where less is, 0 where neither is."""

    def figure(self, report: Report) -> dict[str, Any] | None:
        """Mean, std, interval, and floor of a bias; None for a gap."""
        part = report.summary[self.kind]
        return part if self.kind == "face_rate" else part.get(self.name)

    def by_prompt(self, report: Report) -> np.ndarray:
        """The same, prompt by prompt, (P,); NaN for a gap."""
        return np.array([self._of(prompt) for prompt in report.prompts], float)

    def _of(self, prompt: Mapping[str, Any]) -> float | None:
        if self.kind == "face_rate":
            return prompt["faces"] / prompt["images"] if prompt["images"] else None
        if self.kind == "scores":
            return prompt["scores"].get(self.name)
        return (prompt["attributes"][self.name] or {}).get(self.kind)


@dataclass(frozen=True)
class GroupColumn(Column):
    """A figure of prompts that leave nothing to change."""

    measure: Measure

    def figure(self, report: Report) -> dict[str, Any] | None:
        """Mean, std and interval; None for a gap."""
        estimate = self.measure.of(report.group_summaries())
        return None if estimate is None else asdict(estimate)

    def by_prompt(self, report: Report) -> np.ndarray:
        """The same, prompt by prompt of the group; nothing without the group."""
        group = report.groups.get(self.measure.group)
        return np.array([]) if group is None else self.measure.by_prompt(group)


def group_columns(reports: Sequence[Report]) -> list[Column]:
    """What any of the reports has a figure of, of prompts that leave nothing to change."""
    return [
        GroupColumn("groups", m.name, m.name, m.sign, m)
        for m in measures([report.group_summaries() for report in reports])
    ]


def columns(reports: Sequence[Report]) -> list[Column]:
    """What any of the reports has a figure of: biases, distances from uneven targets, scores."""
    found = []
    for kind, head in (("bias", "bias"), ("deviation", "off target")):
        names = dict.fromkeys(name for report in reports for name in report.summary[kind])
        found += [Column(kind, name, f"{head}, {name}", -1) for name in names]
    found.append(Column("face_rate", "face_rate", "faces", 0))
    scores = dict.fromkeys(name for report in reports[::-1] for name in report.summary["scores"])
    order = sorted(scores, key=lambda name: name in SCORE_NAMES)  # one's own before the usual
    return found + [Column("scores", name, SCORE_NAMES.get(name, name), 1) for name in order]


def difference(column: Column, theirs: Report, ours: Report) -> metrics.PairedTest:
    """How a figure of ours differs from theirs on the same prompts."""
    before, after = column.by_prompt(theirs), column.by_prompt(ours)
    if not len(before) or not len(after):  # one of them has no such prompts
        return metrics.paired_test([], [])
    return metrics.paired_test(before, after)


def compare(entries: Sequence[Entry], against: str | None = None) -> "Comparison":
    """Put reports side by side, counted by the attributes that all of them looked at.

    Of prompts that leave nothing to change those count that all reports with such prompts have.

    Args:
        entries: two or more, of the same prompts and as many images.
        against: label of the row that all others are tested against; left out, the first.

    Raises:
        ValueError: fewer than two reports, labels that are not different, an unknown label, other
            prompts or image counts, no attribute in common.
    """
    if len(entries) < 2:
        raise ValueError(f"expected two reports or more to compare, got {len(entries)}")
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two reports are called '{label}': name them, as in LABEL=REPORT or "
                "GROUP/LABEL=REPORT"
            )
    if against is not None and against not in labels:
        raise ValueError(f"there is no report called '{against}': expected one of {labels}")
    first = entries[0]
    for entry in entries[1:]:
        _check_same(first, entry)
    shared = [a for a in first.report.settings.attributes if _all_looked_at(a, entries)]
    if not shared:
        raise ValueError(
            "the reports have no attribute with the same classes in common: evaluate again with "
            f"{', '.join(a.name for a in first.report.settings.attributes)}"
        )
    counted = _same_groups([_counted(entry.report, shared) for entry in entries])
    alike = tuple(replace(e, report=report) for e, report in zip(entries, counted, strict=True))
    return Comparison(alike, against or first.label)


def _same_groups(reports: Sequence[Report]) -> list[Report]:
    """The reports with the prompts and number of images that all with that group have."""
    kept: list[dict[str, GroupReport]] = [{} for _ in reports]
    for name in GROUPS:
        having = [report.groups[name].group for report in reports if name in report.groups]
        texts = [{(p.text, p.negative) for p in group.prompts} for group in having]
        common = set.intersection(*texts) if texts else set()
        for report, groups in zip(reports, kept, strict=True):
            if name in report.groups and common:
                mine = report.groups[name]
                prompts = [p for p in mine.group.prompts if (p.text, p.negative) in common]
                prompts.sort(key=lambda p: (p.text, p.negative))  # to be paired
                count = min(group.images_per_prompt for group in having)
                groups[name] = mine.of(PromptGroup(name, tuple(prompts), count))
    return [replace(report, groups=groups) for report, groups in zip(reports, kept, strict=True)]


def _counted(report: Report, attributes: Sequence[Attribute]) -> Report:
    """By these attributes and towards their targets."""
    return report if report.settings.attributes == tuple(attributes) else report.of(attributes)


def _check_same(first: Entry, entry: Entry) -> None:
    """Figures of other prompts, or with another floor, stand in no table together."""
    ours, theirs = first.report.settings, entry.report.settings
    if ours.prompts != theirs.prompts:
        raise ValueError(
            f"'{entry.label}' was measured on other prompts than '{first.label}' "
            f"({len(theirs.prompts)} and {len(ours.prompts)}): only reports on the same prompts, "
            "in the same order, can be compared; evaluate one of them again"
        )
    if ours.people != theirs.people:
        raise ValueError(
            f"'{entry.label}' counts the faces of an image by people '{theirs.people}', "
            f"'{first.label}' by '{ours.people}': evaluate one of them again"
        )
    drawn, there = (np.bincount(e.report.records.prompt) for e in (first, entry))
    if not np.array_equal(drawn, there):
        raise ValueError(
            f"'{entry.label}' has {theirs.images_per_prompt} images of each prompt ({sum(there)} "
            f"in all), '{first.label}' has {ours.images_per_prompt} ({sum(drawn)}): the fewer, the "
            "higher the floor of the bias; evaluate with the same number"
        )


def _all_looked_at(attribute: Attribute, entries: Sequence[Entry]) -> bool:
    wanted = attribute.name, attribute.classes, attribute.region
    return all(
        any((a.name, a.classes, a.region) == wanted for a in entry.report.settings.attributes)
        for entry in entries
    )


@dataclass(frozen=True)
class Comparison:
    """Reports side by side; made by `compare`."""

    entries: tuple[Entry, ...]
    against: str
    """Label of the row that the others are tested against."""

    @cached_property
    def columns(self) -> list[Column]:
        """What is compared."""
        reports = [entry.report for entry in self.entries]
        return columns(reports) + group_columns(reports)

    @cached_property
    def groups(self) -> dict[str, list[Entry]]:
        """Rows by group, in order."""
        return {
            group: [entry for entry in self.entries if entry.group == group]
            for group in dict.fromkeys(entry.group for entry in self.entries)
        }

    def is_best(self, entry: Entry, column: Column) -> bool:
        """Whether no row of its group is better, to the digits that are shown."""
        figures = [column.figure(rival.report) for rival in self.groups[entry.group]]
        values = [column.sign * round(f["mean"], DIGITS) for f in figures if f]
        mine = column.figure(entry.report)
        if mine is None or not column.sign or len(values) < 2:
            return False
        return column.sign * round(mine["mean"], DIGITS) == max(values)

    @cached_property
    def differences(self) -> dict[str, dict[str, metrics.PairedTest]]:
        """Label -> column head -> how the row differs from the one they are tested against."""
        ours = next(entry for entry in self.entries if entry.label == self.against)
        return {
            entry.label: {c.head: difference(c, ours.report, entry.report) for c in self.columns}
            for entry in self.entries
            if entry is not ours
        }

    def save(self, folder: str | Path) -> None:
        """Write compare.html, compare.json and compare.md.

        Args:
            folder: made if need be.

        Raises:
            ValueError: the folder is a file.
        """
        from diffusers_fair.reports.page import comparison_page

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"'{folder}' is a file: expected a folder to write the comparison to")
        texts = (
            comparison_page(self),
            json.dumps(self.json(), indent=1, ensure_ascii=False),
            self.markdown(),
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, texts, strict=True):
            (folder / name).write_text(text, "utf-8")

    def json(self) -> dict[str, Any]:
        """Everything in the tables, and where the reports come from."""
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
                    "figures": {c.head: c.figure(entry.report) for c in self.columns},
                    "best": [c.head for c in self.columns if self.is_best(entry, c)],
                    "difference": {
                        head: asdict(test)
                        for head, test in self.differences.get(entry.label, {}).items()
                    },
                    "groups": {
                        name: asdict(summary)
                        for name, summary in entry.report.group_summaries().items()
                    },
                    "provenance": entry.report.provenance,
                }
                for entry in self.entries
            ],
        }

    def markdown(self) -> str:
        """The figures, and the differences, as two tables."""
        settings = self.entries[0].report.settings
        lines = [
            "# Comparison",
            "",
            f"{len(settings.prompts)} prompts x {settings.images_per_prompt} images. Mean ± std "
            "over prompts [95 % bootstrap interval of the mean], and for a bias (its floor: what a "
            "generator exactly on target would score). **Bold**: best of its group.",
            "",
            *markdown_table(["", *(c.head for c in self.columns)], self._rows()),
            "",
            f"Difference from {_plain(self.against)}, prompt by prompt: mean [95 % paired bootstrap"
            " interval], p of Wilcoxon's signed-rank test (for each cell alone).",
            "",
            *markdown_table(["", *(c.head for c in self.columns)], self._difference_rows()),
            "",
        ]
        return "\n".join(lines)

    def _rows(self) -> Iterator[list[str]]:
        for group, entries in self.groups.items():
            if group:
                yield [f"*{_plain(group)}*", *[""] * len(self.columns)]
            for entry in entries:
                marked = [
                    f"**{cell}**" if self.is_best(entry, c) else cell
                    for c in self.columns
                    for cell in [_figure(c.figure(entry.report))]
                ]
                yield [_plain(entry.label), *marked]

    def _difference_rows(self) -> Iterator[list[str]]:
        for entry in self.entries:
            if entry.label != self.against:
                found = self.differences[entry.label]
                yield [_plain(entry.label), *(_difference(found[c.head]) for c in self.columns)]


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _figure(figure: Mapping[str, Any] | None) -> str:
    """As `0.671 ± 0.281 [0.592, 0.744] (0.103)`."""
    if figure is None:
        return GAP
    floor = f" ({figure['floor']:.{DIGITS}f})" if "floor" in figure else ""
    spread = f"{figure['mean']:.{DIGITS}f} ± {figure['std']:.{DIGITS}f}"
    return f"{spread}{_interval(figure['interval'])}{floor}"


def _difference(test: metrics.PairedTest) -> str:
    """As `-0.509 [-0.583, -0.436], p = 1.2e-09`."""
    if test.difference is None:
        return GAP
    p = "" if test.p_value is None else f", p = {test.p_value:.2g}"
    return f"{test.difference:+.{DIGITS}f}{_interval(test.interval)}{p}"


def _interval(ends: Sequence[float] | None) -> str:
    return f" [{ends[0]:.{DIGITS}f}, {ends[1]:.{DIGITS}f}]" if ends else ""


def _plain(text: str) -> str:
    """In a cell of a markdown table, and nothing else."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
