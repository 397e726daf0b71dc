"""The headline of a report, or of two side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusers_fair.reports.groups import Estimate
from diffusers_fair.reports.obedience import measures
from diffusers_fair.reports.report import GAP, SCORE_NAMES, Report

if TYPE_CHECKING:
    from rich.table import Table

GAPS = {  # prompts of which there is no bias
    "prompts_without_images": "prompts without images",
    "prompts_without_faces": "prompts without any face",
    "prompts_with_one_face": "prompts with one face only",
}


def table(before: Report, after: Report | None = None) -> "Table":
    """The headline of one report, or of two side by side; at most 100 columns wide.

    Args:
        before: usually the base model's.
        after: usually with the adapter.

    Returns:
        A rich table, for `rich.print` or a console.
    """
    try:
        from rich.table import Table
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tables need rich: pip install 'diffusers-fair[train]'") from None
    reports = [before] if after is None else [before, after]
    grid = Table(
        title=_title(reports[-1]),
        caption="mean ± std over prompts [95 % bootstrap interval of the mean, over prompts]\n"
        "floor: what a generator exactly on target would score with as many images\n"
        "errors corrected: from the classifier's errors on other pictures; scatters more",
        title_justify="left",
        caption_justify="left",
    )
    grid.add_column("")
    for report in reports:
        grid.add_column(report.label, min_width=31)  # of "-0.123 ± 0.123 [-0.123, 0.123]"
    for row in [*_rows([report.summary for report in reports]), *_group_rows(reports)]:
        grid.add_row(*row)
    return grid


def _title(report: Report) -> str:
    """As `50 prompts x 60 images`, or the number of all images where prompts differ in it."""
    prompts, each = len(report.settings.prompts), report.settings.images_per_prompt
    images = len(report.records.found)
    if images == prompts * each:
        return f"{prompts} prompts x {each} images"
    return f"{prompts} prompts, {images} images"


def _rows(summaries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Head of a row and what it shows of each summary."""
    for kind, head in (("bias", "bias"), ("deviation", "off target")):
        for name in _names(summaries, kind):
            figures = [s[kind].get(name) for s in summaries]
            yield [f"{head}, {name}", *map(_cell, figures)]
            yield ["  floor", *(GAP if f is None else f"{f['floor']:.3f}" for f in figures)]
            yield ["  scatter removed", *(_cell(f and f["without_scatter"]) for f in figures)]
            if kind == "bias" and any(name in s["corrected"] for s in summaries):
                yield ["  errors corrected", *(_cell(s["corrected"].get(name)) for s in summaries)]
    yield ["images with a face", *(_cell(s["face_rate"]) for s in summaries)]
    for name in _names(summaries[::-1], "scores"):
        yield [SCORE_NAMES.get(name, name), *(_cell(s["scores"].get(name)) for s in summaries)]
    for gap, head in GAPS.items():
        if any(s[gap] for s in summaries):
            yield [head, *(str(len(s[gap])) for s in summaries)]


def _group_rows(reports: Sequence[Report]) -> Iterator[list[str]]:
    """Head and figures of what prompts ask for or leave alone, of the last report's prompts."""
    sides = [report.group_summaries(reports[-1]) for report in reports]
    for measure in measures(sides):
        head = f"  {measure.part}" if measure.part else measure.head
        yield [head, *(_estimate(measure.of(side)) for side in sides)]


def _names(summaries: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """What any of the summaries has a figure of, in order."""
    return list(dict.fromkeys(name for summary in summaries for name in summary[kind]))


def _estimate(estimate: Estimate | None) -> str:
    return GAP if estimate is None else _cell(vars(estimate))


def _cell(figure: Mapping[str, Any] | None) -> str:
    """As `0.671 ± 0.281 [0.592, 0.744]`; a dash for a gap."""
    if figure is None:
        return GAP
    spread = f" ± {figure['std']:.3f}" if "std" in figure else ""
    low_high = figure["interval"]
    interval = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
    return f"{figure['mean']:.3f}{spread}{interval}"
