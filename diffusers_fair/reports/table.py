"""The main results of a report, or of two side by side, as a console table."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from diffusers_fair.reports.columns import BiasColumn, bias_columns, score_columns
from diffusers_fair.reports.estimate import DIGITS, GAP, estimate_text
from diffusers_fair.reports.measures import measures
from diffusers_fair.reports.report import Report

if TYPE_CHECKING:
    from rich.table import Table


def table(before: Report, after: Report | None = None) -> "Table":
    """Make a table of one report, or of two side by side; at most 100 columns wide.

    Args:
        before: usually the base model's.
        after: usually the adapter's.

    Returns:
        A rich table, for `rich.print` or a console.
    """
    try:
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tables need rich: pip install 'diffusers-fair[train]'") from None
    reports = [before] if after is None else [before, after]
    grid = Table(
        title=_title(reports[-1]),
        caption="\n".join(_notes(bias_columns(reports), reports)),
        title_justify="left",
        caption_justify="left",
    )
    grid.add_column("")
    for report in reports:
        # without a minimum: a narrow console wraps, and cuts nothing
        grid.add_column(Text(report.label))
    for row in [*_rows(reports), *_measure_rows(reports)]:
        grid.add_row(*map(Text, row))  # names are no markup
    return grid


def _notes(columns: Sequence[BiasColumn], reports: Sequence[Report]) -> Iterator[str]:
    """Explain the rows that the table has."""
    yield "mean ± std over prompts [95 % bootstrap interval of the mean over prompts]"
    if any(column.from_target for column in columns):
        yield "deviation: from a target that is not uniform"
    yield "noise floor: expected value for a generator exactly on target, with as many images"
    if any(column.corrected(report) for column in columns for report in reports):
        yield (
            "errors corrected: bias corrected for the classifier's error rates; has a larger "
            "variance"
        )


def _title(report: Report) -> str:
    """Format the size: `50 prompts x 60 images`, or all images if their number varies."""
    prompts, images_per_prompt = len(report.settings.prompts), report.settings.images_per_prompt
    images = len(report.records.found)
    if images == prompts * images_per_prompt:
        return f"{prompts} prompts x {images_per_prompt} images"
    return f"{prompts} prompts, {images} images"


def _rows(reports: Sequence[Report]) -> Iterator[list[str]]:
    """Yield rows: the head, and a cell for each report."""
    for column in bias_columns(reports):
        yield from _bias_rows(column, reports)
    for score in score_columns(reports):
        yield [score.head, *(estimate_text(score.estimate(report)) for report in reports)]
    yield from _gap_rows(reports)


def _bias_rows(column: BiasColumn, reports: Sequence[Report]) -> Iterator[list[str]]:
    biases = [column.estimate(report) for report in reports]
    without = [bias and bias.without_sampling_variance for bias in biases]
    corrected = [column.corrected(report) for report in reports]
    head = f"deviation, {column.name}" if column.from_target else column.head  # short enough
    yield [head, *map(estimate_text, biases)]
    yield ["  noise floor", *(f"{b.noise_floor:.{DIGITS}f}" if b else GAP for b in biases)]
    yield ["  without sampling variance", *map(estimate_text, without)]
    if any(corrected):
        yield ["  errors corrected", *map(estimate_text, corrected)]


def _gap_rows(reports: Sequence[Report]) -> Iterator[list[str]]:
    """Yield the numbers of prompts without a bias, by reason."""
    gaps = {
        "prompts without images": [report.summary.prompts_without_images for report in reports],
        "prompts without any face": [report.summary.prompts_without_faces for report in reports],
        "prompts with one face only": [report.summary.prompts_with_one_face for report in reports],
    }
    for head, prompts in gaps.items():
        if any(prompts):
            yield [head, *(str(len(names)) for names in prompts)]


def _measure_rows(reports: Sequence[Report]) -> Iterator[list[str]]:
    """Yield the measures of control prompts, on the prompts of the last report."""
    sides = [report.group_summaries(reports[-1]) for report in reports]
    for measure in measures(sides):
        head = f"  {measure.part}" if measure.part else measure.head
        yield [head, *(estimate_text(measure.estimate(side)) for side in sides)]
