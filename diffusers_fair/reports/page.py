"""report.html and compare.html: whole in one file, for someone who has not read the paper.

Templates escape whatever is put in them, and the pages forbid themselves to fetch anything.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.metrics import PairedTest
from diffusers_fair.reports.comparison import BIASES, Column, Comparison, columns, difference
from diffusers_fair.reports.groups import GroupReport
from diffusers_fair.reports.obedience import by_attribute, measures, warning
from diffusers_fair.reports.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
PICTURE = 256  # longest side of a picture in the page, pixels
HUES = 8  # colours of classes in style.css
WORST = 12  # prompts that are shown at once; the others on demand
GAPS = {
    "prompts_without_images": "No image",
    "prompts_without_faces": "No image with a face",
    "prompts_with_one_face": "Only one image with a face",
}
TEMPLATE_LETTERS = 10  # that prompts must share for only the rest of them to be shown


def report_page(report: Report) -> str:
    """The page of a report, beside its reference where it has one.

    Args:
        report: of any pipeline; prompts and labels may hold anything.

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
            pictures=_pictures(reports),
            kept=_kept_groups(reports),
            kept_rows=_kept_rows(reports),
            warning=warning(report.shortfalls(), report.label),
            unseen=_unseen(report),
            errors=_errors(report),
            few=_images_each(report),
            gaps=GAPS,
            of_faces=[a.name for a in report.settings.attributes if a.of_faces],
            of_whole=[a.name for a in report.settings.attributes if not a.of_faces],
        )
    )


def comparison_page(comparison: Comparison) -> str:
    """The page of a comparison.

    Returns:
        HTML.
    """
    biases = [c for c in comparison.columns if c.kind in BIASES]
    return (
        _environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            settings=comparison.entries[0].report.settings,
            few=_images_each(comparison.entries[0].report),
            biases=[
                (c, _top(c.figure(entry.report) for entry in comparison.entries)) for c in biases
            ],
        )
    )


def prompt_template(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, if that is worth leaving out; else nothing twice."""
    if len(prompts) < 2:
        return "", ""
    start = _shared_start(prompts)
    start = start[: start.rfind(" ") + 1]
    ends = [prompt[len(start) :][::-1] for prompt in prompts]
    end = _shared_start(ends)[::-1]
    end = end[min((i for i in (end.find(" "), end.find(",")) if i >= 0), default=len(end)) :]
    rests = [prompt[len(start) : len(prompt) - len(end)].strip() for prompt in prompts]
    worth = len(start + end) >= TEMPLATE_LETTERS and all(rests)
    return (start, end) if worth else ("", "")


def _shared_start(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)
    pairs = enumerate(zip(least, most, strict=False))
    return least[: next((i for i, (x, y) in pairs if x != y), min(len(least), len(most)))]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": _number, "percent": _percent, "signed": _signed}
    made.globals |= {"worst_shown": WORST}
    return made


def _number(value: float | None) -> str:
    return "no figure" if value is None else f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _percent(value: float | None) -> str:
    return "too few faces" if value is None else f"{value:.0%}"


# ---- figures -------------------------------------------------------------------------------------


def _headline(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Biases and distances from uneven targets: of each report, and what changed."""
    alone = {a.name for a in reports[-1].settings.attributes}
    whole = reports[-1].settings.measured()[-1].name
    return [
        {
            "column": c,
            "card": c.name in alone | {whole},
            "figures": (figures := [c.figure(report) for report in reports]),
            "top": _top(figures),
            "corrected": [
                report.summary["corrected"].get(c.name) if c.kind == "bias" else None
                for report in reports
            ],
            "change": _change(c, reports),
        }
        for c in columns(reports)
        if c.sign < 0
    ]


def _score_rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [
        {
            "column": c,
            "figures": [c.figure(report) for report in reports],
            "change": _change(c, reports),
        }
        for c in columns(reports)
        if c.sign >= 0
    ]


def _change(column: Column, reports: Sequence[Report]) -> PairedTest | None:
    """From the reference to the report, prompt by prompt; None where one of them has no figure."""
    if len(reports) < 2:
        return None
    test = difference(column, *reports)
    return test if test.prompts else None


def _top(figures: Iterable[Mapping[str, Any] | None]) -> float:
    """End of a scale that holds the figures, their intervals and floors: a multiple of 0.1."""
    shown = [0.1]
    for figure in filter(None, figures):
        shown += [figure["mean"], figure["floor"], *(figure["interval"] or ())]
    return float(np.ceil(max(shown) * 10 - 1e-9) / 10)


def _shares(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """How often each class was perceived, on average over prompts."""
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
    classes = report.summary["frequencies"][attribute.name]
    return classes and classes[name]["mean"]


def _charts(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Figure 4 of the paper, for each class of each attribute: its share by prompt."""
    return [
        {"attribute": a, "name": name, "target": target, "rows": _rows(reports, a, name, target)}
        for a in reports[-1].settings.attributes
        for name, target in zip(a.classes, a.target, strict=True)
    ]


def _rows(
    reports: Sequence[Report], attribute: Attribute, name: str, target: float
) -> list[dict[str, Any]]:
    """A class's share in each prompt, those farthest from the target first, gaps last."""
    rows = []
    for i, prompt in enumerate(reports[-1].settings.prompts):
        figures = [report.prompts[i]["attributes"][attribute.name] for report in reports]
        shares = [figure and figure["frequencies"][name] for figure in figures]
        rows.append({"prompt": prompt, "shares": shares})
    return sorted(
        rows, key=lambda r: 1.0 if r["shares"][-1] is None else -abs(r["shares"][-1] - target)
    )


def _worst(reports: Sequence[Report]) -> dict[str, Any]:
    """Every prompt's biases, the worst prompts first, gaps last."""
    shown = [row["column"] for row in _headline(reports)]
    values = [[c.by_prompt(report) for c in shown] for report in reports]
    rows = [
        {
            "prompt": reports[-1].settings.prompts[i],
            "faces": reports[-1].prompts[i]["faces"],
            "images": reports[-1].prompts[i]["images"],
            "values": [[_finite(v[k][i]) for v in values] for k in range(len(shown))],
        }
        for i in _worst_first(reports[-1])
    ]
    return {"columns": shown, "by": _judged_by(reports[-1]), "rows": rows}


def _judged_by(report: Report) -> Column:
    """What makes a prompt worse than another: the joint of all attributes, or the only one."""
    name = report.settings.measured()[-1].name
    found = [c for c in columns([report]) if c.name == name and c.sign < 0]
    return found[-1]  # distance from the target, where that is not uniform


def _worst_first(report: Report) -> list[int]:
    values = _judged_by(report).by_prompt(report)  # (P,)
    return np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable").tolist()


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _unseen(report: Report) -> list[str]:
    """Classes that were perceived nowhere."""
    return [
        f"{a.name}: {name}"
        for a in report.settings.attributes
        for name in a.classes
        if _share(report, a, name) == 0
    ]


def _errors(report: Report) -> dict[str, float]:
    """Attribute -> share of pictures of known class that its classifier sees wrongly."""
    counts = {name: np.array(confusion, float) for name, confusion in report.confusion.items()}
    return {name: float(1 - np.trace(n) / n.sum()) for name, n in counts.items()}


def _images_each(report: Report) -> str:
    """As `60`, or `3 to 60` where prompts differ in it."""
    drawn = np.bincount(report.records.prompt, minlength=len(report.settings.prompts))
    return " to ".join(str(n) for n in sorted({int(drawn.min()), int(drawn.max())}))


# ---- pictures ------------------------------------------------------------------------------------


def _pictures(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Images that were kept, prompt by prompt, the worst first; same noise side by side."""
    after = reports[-1]
    kept = set.intersection(*(set(report.samples) for report in reports)) or set(after.samples)
    shown = [report for report in reports if kept <= set(report.samples)]
    return [
        {
            "prompt": after.settings.prompts[i],
            "pairs": [
                [_tile(report.label, report, report.settings.attributes, i, j) for report in shown]
                for j in range(_kept(shown, i))
            ],
        }
        for i in _worst_first(after)
        if i in kept
    ]


def _kept(reports: Sequence[Report], prompt: int) -> int:
    """Images of a prompt that every report kept and counted."""
    return min(min(len(r.samples[prompt]), r.settings.images_per_prompt) for r in reports)


def _kept_groups(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The groups of prompts that leave nothing to change, and pictures of a few of them."""
    return [
        {
            "name": name,
            "prompts": len(group.group.prompts),
            "images": group.group.images_per_prompt,
            "pictures": _group_pictures(reports, group),
        }
        for name, group in reports[-1].groups.items()
    ]


def _group_pictures(reports: Sequence[Report], group: GroupReport) -> list[dict[str, Any]]:
    """Images of a group that were kept, prompt by prompt; same noise side by side."""
    named = [(report.label, report.group_like(group)) for report in reports]
    sides = [(label, side) for label, side in named if side is not None]
    return [
        {
            "prompt": group.group.prompts[i].text,
            "asks": ", ".join(group.group.prompts[i].asks.values()),
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


def _kept_rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Each figure of the groups, of the reference and of the report."""
    sides = [report.group_summaries(reports[-1]) for report in reports]
    return [
        {"name": measure.name, "base": measure.base, "figures": [measure.of(s) for s in sides]}
        for measure in [*measures(sides), *by_attribute(sides[-1])]
    ]


def _tile(
    label: str, seen: Report | GroupReport, attributes: Sequence[Attribute], prompt: int, image: int
) -> dict[str, Any]:
    """A picture, the face in it, and what it was perceived as (Figure 3 of the paper)."""
    records, pixels = seen.records, seen.samples[prompt][image]  # (h, w, 3)
    row = int(np.flatnonzero((records.prompt == prompt) & (records.image == image))[0])
    hue, perceived, found = count(), [], bool(records.found[row])
    for a in attributes:
        hues = [next(hue) % HUES for _ in a.classes]
        p = records.probabilities[a.name][row]  # (classes,)
        k = int(p.argmax())
        if found or not a.of_faces:
            perceived.append(
                {"attribute": a.name, "name": a.classes[k], "sure": float(p[k]), "hue": hues[k]}
            )
    return {
        "label": label,
        "source": _data_uri(pixels),
        "size": (pixels.shape[1], pixels.shape[0]),
        "box": records.boxes[row].tolist() if found else None,
        "perceived": perceived,
    }


def _data_uri(pixels: np.ndarray) -> str:
    """A picture (h, w, 3) within the page, no larger than is needed there."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((PICTURE, PICTURE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
