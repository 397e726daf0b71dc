"""report.html and compare.html: self-contained pages for readers who have not read the paper.

The templates escape every value, and the pages' content security policy forbids all requests.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.metrics import PairedTest
from diffusers_fair.reports.columns import (
    BiasColumn,
    Column,
    bias_columns,
    difference,
    score_columns,
)
from diffusers_fair.reports.comparison import Comparison
from diffusers_fair.reports.estimate import DIGITS
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.measures import attribute_measures, measures, warning
from diffusers_fair.reports.report import Report
from diffusers_fair.reports.summary import BiasEstimate

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_SIZE = 256  # longest side of an image in the page, in pixels
_HUES = 8  # colours of classes in style.css
WORST = 12  # prompts that are shown unfolded; the others are folded away
_MIN_SHARED_LETTERS = 10  # letters shared by all prompts from which only the rest is shown


def report_page(report: Report) -> str:
    """Render a report, and compare it with its reference if it has one.

    Args:
        report: report to render; its prompts and labels may hold any text.

    Returns:
        HTML.
    """
    reports = [report] if report.reference is None else [report.reference, report]
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            reports=reports,
            settings=report.settings,
            summary=report.summary,
            template=prompt_template(report.settings.prompts),
            headline=_headline(reports),
            scores=_score_rows(reports),
            shares=_shares(reports),
            charts=_charts(reports),
            worst=_worst(reports),
            samples=_samples(reports),
            control=_control_groups(reports),
            control_rows=_control_rows(reports),
            warning=warning(report.shortfalls(), report.label),
            unseen=_never_perceived(report),
            errors=_error_rates(report),
            images_each=_images_each(report),
            gaps=_gaps(report),
            of_faces=[a.name for a in report.settings.attributes if a.of_faces],
            of_whole=[a.name for a in report.settings.attributes if not a.of_faces],
        )
    )


def comparison_page(comparison: Comparison) -> str:
    """Render a comparison.

    Returns:
        HTML.
    """
    reports = [entry.report for entry in comparison.entries]
    return (
        _environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            settings=reports[0].settings,
            images_each=_images_each(reports[0]),
            biases=[(c, _scale_end(map(c.estimate, reports))) for c in bias_columns(reports)],
        )
    )


def prompt_template(prompts: Sequence[str]) -> tuple[str, str]:
    """Find the start and end that all prompts share; both are empty if they are too short."""
    if len(prompts) < 2:
        return "", ""
    start = _shared_start(prompts)
    start = start[: start.rfind(" ") + 1]
    ends = [prompt[len(start) :][::-1] for prompt in prompts]
    end = _shared_start(ends)[::-1]
    end = end[min((i for i in (end.find(" "), end.find(",")) if i >= 0), default=len(end)) :]
    rests = [prompt[len(start) : len(prompt) - len(end)].strip() for prompt in prompts]
    is_worth_it = len(start + end) >= _MIN_SHARED_LETTERS and all(rests)
    return (start, end) if is_worth_it else ("", "")


def _shared_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all others share at least as much
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (x, y) in pairs if x != y), min(len(first), len(last)))]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "signed": _signed}
    environment.globals |= {"worst_shown": WORST}
    return environment


def _number(value: float | None) -> str:
    return "no value" if value is None else f"{value:.{DIGITS}f}"


def _signed(value: float) -> str:
    return f"{value:+.{DIGITS}f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float | None) -> str:
    return "too few faces" if value is None else f"{value:.0%}"


# ---- statistics ----------------------------------------------------------------------------------


def _headline(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect biases and deviations from target: those of each report, and the change."""
    measured = reports[-1].settings.measured()
    cards = {a.name for a in reports[-1].settings.attributes} | {measured[-1].name}
    rows = []
    for column in bias_columns(reports):
        estimates = [column.estimate(report) for report in reports]
        rows.append(
            {
                "head": column.head,
                "is_bias": True,
                "card": column.name in cards,
                "estimates": estimates,
                "scale_end": _scale_end(estimates),
                "can_be_corrected": not column.from_target,
                "corrected": [column.corrected(report) for report in reports],
                "change": _change(column, reports),
            }
        )
    return rows


def _score_rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [
        {
            "head": column.head,
            "is_bias": False,
            "estimates": [column.estimate(report) for report in reports],
            "change": _change(column, reports),
        }
        for column in score_columns(reports)
    ]


def _change(column: Column, reports: Sequence[Report]) -> PairedTest | None:
    """Test the change from the reference, paired by prompt; None if either lacks the value."""
    if len(reports) < 2:
        return None
    test = difference(column, *reports)
    return test if test.prompts else None


def _scale_end(biases: Iterable[BiasEstimate | None]) -> float:
    """Choose the end of a scale that fits all means, intervals and noise floors."""
    shown = [0.1]
    for bias in filter(None, biases):
        shown += [bias.mean, bias.noise_floor, *(bias.interval or ())]
    return float(np.ceil(max(shown) * 10 - 1e-9) / 10)


def _gaps(report: Report) -> dict[str, Sequence[str]]:
    """Map reasons for a missing bias to prompts."""
    summary = report.summary
    return {
        "No image": summary.prompts_without_images,
        "No image with a face": summary.prompts_without_faces,
        "Only one image with a face": summary.prompts_with_one_face,
    }


def _shares(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect how often each class was perceived, on average over prompts."""
    return [
        {
            "attribute": a,
            "classes": [
                {
                    "name": name,
                    "target": target,
                    "shares": [_share(report, a, name) for report in reports],
                }
                for name, target in zip(a.classes, a.target, strict=True)
            ],
        }
        for a in reports[-1].settings.measured()
    ]


def _share(report: Report, attribute: Attribute, name: str) -> float | None:
    classes = report.summary.frequencies[attribute.name]
    return None if classes is None else classes[name].mean


def _charts(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect the share of each class in each prompt, as in Figure 4 of the paper."""
    return [
        {"attribute": a, "name": name, "target": target, "rows": _rows(reports, a, name, target)}
        for a in reports[-1].settings.attributes
        for name, target in zip(a.classes, a.target, strict=True)
    ]


def _rows(
    reports: Sequence[Report], attribute: Attribute, name: str, target: float
) -> list[dict[str, Any]]:
    """Collect the share of a class in each prompt, farthest from the target first, gaps last."""
    rows = []
    for i, prompt in enumerate(reports[-1].settings.prompts):
        biases = [report.prompts[i].attributes[attribute.name] for report in reports]
        shares = [bias and bias.frequencies[name] for bias in biases]
        rows.append({"prompt": prompt, "shares": shares})
    return sorted(
        rows, key=lambda r: 1.0 if r["shares"][-1] is None else -abs(r["shares"][-1] - target)
    )


def _worst(reports: Sequence[Report]) -> dict[str, Any]:
    """Collect the biases of each prompt, the worst prompts first, gaps last."""
    shown, report = bias_columns(reports), reports[-1]
    values = [[column.by_prompt(side) for column in shown] for side in reports]
    rows = [
        {
            "prompt": report.prompts[i].prompt,
            "faces": report.prompts[i].faces,
            "images": report.prompts[i].images,
            "values": [[_finite(v[k][i]) for v in values] for k in range(len(shown))],
        }
        for i in _worst_first(report)
    ]
    return {"heads": [c.head for c in shown], "by": _ranking_column(report).head, "rows": rows}


def _ranking_column(report: Report) -> BiasColumn:
    """Choose the column that ranks prompts: the joint of all attributes, or the only attribute."""
    name = report.settings.measured()[-1].name
    candidates = [column for column in bias_columns([report]) if column.name == name]
    return candidates[-1]  # the deviation from the target, if that is not uniform


def _worst_first(report: Report) -> list[int]:
    values = _ranking_column(report).by_prompt(report)  # (P,)
    return np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable").tolist()


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _never_perceived(report: Report) -> list[str]:
    """List the classes that were perceived in no image."""
    return [
        f"{a.name}: {name}"
        for a in report.settings.attributes
        for name in a.classes
        if _share(report, a, name) == 0
    ]


def _error_rates(report: Report) -> dict[str, float]:
    """Map attributes to the error rate of their classifier on held-out images."""
    counts = {name: np.array(confusion, float) for name, confusion in report.confusion.items()}
    return {name: float(1 - np.trace(n) / n.sum()) for name, n in counts.items()}


def _images_each(report: Report) -> str:
    """Format the number of images per prompt: `60`, or `3 to 60` if prompts differ."""
    images = np.bincount(report.records.prompt, minlength=len(report.settings.prompts))
    return " to ".join(str(n) for n in sorted({int(images.min()), int(images.max())}))


# ---- images --------------------------------------------------------------------------------------


def _samples(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect sample images, worst prompts first; images from the same noise are side by side."""
    after = reports[-1]
    shared = set.intersection(*(set(report.samples) for report in reports)) or set(after.samples)
    shown = [report for report in reports if shared <= set(report.samples)]
    return [
        {
            "prompt": after.settings.prompts[i],
            "pairs": [
                [_tile(report.label, report, report.settings.attributes, i, j) for report in shown]
                for j in range(_shared_count(shown, i))
            ],
        }
        for i in _worst_first(after)
        if i in shared
    ]


def _shared_count(reports: Sequence[Report], prompt: int) -> int:
    """Count the sample images of a prompt that every report has."""
    return min(min(len(r.samples[prompt]), r.settings.images_per_prompt) for r in reports)


def _control_groups(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect the groups of control prompts, with samples of a few prompts."""
    return [
        {
            "name": name,
            "prompts": len(group.group.prompts),
            "images": group.group.images_per_prompt,
            "samples": _group_samples(reports, group),
        }
        for name, group in reports[-1].groups.items()
    ]


def _group_samples(reports: Sequence[Report], group: GroupReport) -> list[dict[str, Any]]:
    """Collect sample images of a group; images from the same noise are side by side."""
    named = [(report.label, report.group_like(group)) for report in reports]
    sides = [(label, side) for label, side in named if side is not None]
    return [
        {
            "prompt": group.group.prompts[i].text,
            "asks": ", ".join(group.group.prompts[i].expected_classes.values()),
            "negative": group.group.prompts[i].negative,
            "pairs": [
                [
                    _tile(label, side, group.attributes, i, j)
                    for label, side in sides
                    if j < len(side.samples.get(i, ()))
                ]
                for j in range(len(group.samples[i]))
            ],
        }
        for i in sorted(group.samples)
    ]


def _control_rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Collect the measures of control prompts, of each report."""
    sides = [report.group_summaries(reports[-1]) for report in reports]
    return [
        {"name": m.name, "base": m.base, "estimates": [m.estimate(side) for side in sides]}
        for m in [*measures(sides), *attribute_measures(sides[-1])]
    ]


def _tile(
    label: str, side: Report | GroupReport, attributes: Sequence[Attribute], prompt: int, image: int
) -> dict[str, Any]:
    """Describe an image, its face and the perceived classes (Figure 3 of the paper)."""
    records, pixels = side.records, side.samples[prompt][image]  # (h, w, 3)
    row = int(np.flatnonzero((records.prompt == prompt) & (records.image == image))[0])
    hue, perceived, has_face = count(), [], bool(records.found[row])
    for a in attributes:
        hues = [next(hue) % _HUES for _ in a.classes]
        p = records.probabilities[a.name][row]  # (classes,)
        k = int(p.argmax())
        if has_face or not a.of_faces:
            perceived.append(
                {"attribute": a.name, "name": a.classes[k], "sure": float(p[k]), "hue": hues[k]}
            )
    return {
        "label": label,
        "source": _data_uri(pixels),
        "size": (pixels.shape[1], pixels.shape[0]),
        "box": records.boxes[row].tolist() if has_face else None,
        "perceived": perceived,
    }


def _data_uri(pixels: np.ndarray) -> str:
    """Embed an image (h, w, 3), shrunk to the size that the page needs."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
