"""A comparison as Markdown."""

import html
from collections.abc import Iterable, Iterator

from diffusers_fair import metrics
from diffusers_fair.reports.comparison import Comparison
from diffusers_fair.reports.estimate import DIGITS, GAP, Estimate, estimate_text, interval_text
from diffusers_fair.reports.summary import BiasEstimate


def comparison_markdown(comparison: Comparison) -> str:
    """Format the estimates and the differences as two tables."""
    settings = comparison.entries[0].report.settings
    head = ["", *(column.head for column in comparison.columns)]
    lines = [
        "# Comparison",
        "",
        f"{len(settings.prompts)} prompts x {settings.images_per_prompt} images. Mean ± std "
        "over prompts [95 % bootstrap interval of the mean], and for a bias (its noise floor: the "
        "expected value for a generator exactly on target). **Bold**: best of its group.",
        "",
        *markdown_table(head, _rows(comparison)),
        "",
        f"Difference from {_plain(comparison.against)}, prompt by prompt: mean [95 % paired "
        "bootstrap interval], p-value of Wilcoxon's signed-rank test (for each cell alone).",
        "",
        *markdown_table(head, _difference_rows(comparison)),
        "",
    ]
    return "\n".join(lines)


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    for group, entries in comparison.groups.items():
        if group:
            yield [f"*{_plain(group)}*", *[""] * len(comparison.columns)]
        for entry in entries:
            cells = [
                f"**{text}**" if comparison.is_best(entry, column) else text
                for column in comparison.columns
                for text in [_estimate(column.estimate(entry.report))]
            ]
            yield [_plain(entry.label), *cells]


def _difference_rows(comparison: Comparison) -> Iterator[list[str]]:
    for label, tests in comparison.differences.items():
        yield [_plain(label), *(_difference(tests[c.head]) for c in comparison.columns)]


def _estimate(estimate: Estimate | None) -> str:
    """Format an estimate, for example `0.671 ± 0.281 [0.592, 0.744] (0.103)`."""
    text = estimate_text(estimate)
    if isinstance(estimate, BiasEstimate):
        text += f" ({estimate.noise_floor:.{DIGITS}f})"
    return text


def _difference(test: metrics.PairedTest) -> str:
    """Format a difference, for example `-0.509 [-0.583, -0.436], p = 1.2e-09`."""
    if test.difference is None:
        return GAP
    p = "" if test.p_value is None else f", p = {test.p_value:.2g}"
    return f"{test.difference:+.{DIGITS}f}{interval_text(test.interval)}{p}"


def _plain(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
