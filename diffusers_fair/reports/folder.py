"""Report folders: report.json, records.jsonl, features.npz, report.html and images.

A loaded report computes its statistics from the records again; they equal those in report.json.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair import strict_json
from diffusers_fair.attributes import Attribute
from diffusers_fair.paths import expand, require_writable
from diffusers_fair.reports.comparison import Comparison
from diffusers_fair.reports.groups import GroupReport, group_from_json
from diffusers_fair.reports.images import groups_sheet, pairs_sheet
from diffusers_fair.reports.markdown import comparison_markdown
from diffusers_fair.reports.page import comparison_page, report_page
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.report import Report

FORMAT = 1
FILE, _RECORDS, _FEATURES = "report.json", "records.jsonl", "features.npz"
PAGE, COMPARISON_PAGE = "report.html", "compare.html"
PAIRS, GROUPS_SHEET = "pairs.png", "groups.png"  # the same noise without and with the adapter


# ---- saving --------------------------------------------------------------------------------------


def save_report(report: Report, folder: str | Path) -> None:
    """Write a report folder, either completely or not at all.

    Args:
        report: report to save. Of its reference, only the summaries are saved.
        folder: created if needed; may hold other files, but no report.

    Raises:
        ValueError: the folder already holds a report, or is a file.
    """
    folder = require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report-") as partial:
        _write(report, Path(partial))
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(partial).iterdir(), key=lambda f: f.name == FILE):
            os.replace(file, folder / file.name)  # report.json last: it marks a complete report


def require_free(folder: str | Path) -> Path:
    """Check that a report can be saved in the folder; to be called before hours of work.

    Raises:
        ValueError: the folder already holds a report, is a file, or cannot be written to.
    """
    folder = require_writable(folder)
    if (folder / FILE).exists():
        raise ValueError(f"'{folder}' already holds a report: choose another folder")
    return folder


def report_json(report: Report) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "format": FORMAT,
        "label": report.label,
        "settings": report.settings.json(),
        "confusion": report.confusion,
        "summary": report.summary.json(),
        "groups": {name: group.json() for name, group in report.groups.items()},
        "reference": report.reference and _reference_json(report.reference, report),
        "prompts": [prompt.json() for prompt in report.prompts],
        "samples": {str(i): len(images) for i, images in report.samples.items()},
        "provenance": report.provenance,
    }


def _reference_json(reference: Report, report: Report) -> dict[str, Any]:
    """Return the summaries of the reference, on the control prompts of the report."""
    groups = reference.group_summaries(report).items()
    return {
        "summary": reference.summary.json(),
        "groups": {name: {"summary": asdict(summary)} for name, summary in groups},
    }


def _write(report: Report, folder: Path) -> None:
    (folder / PAGE).write_text(report_page(report), "utf-8")
    (folder / FILE).write_text(
        strict_json.dumps(report_json(report), indent=1, ensure_ascii=False), "utf-8"
    )
    neutral = report.records.lines(report.settings.attributes)
    lines = chain(neutral, *(group.lines() for group in report.groups.values()))
    (folder / _RECORDS).write_text(
        "".join(strict_json.dumps(line) + "\n" for line in lines), "utf-8"
    )
    _write_features(report, folder)
    _write_images(report, folder)


def _write_features(report: Report, folder: Path) -> None:
    features = dict(report.records.features)
    for name, group in report.groups.items():
        features |= {f"{name}/{key}": x for key, x in group.records.features.items()}
    if features:
        np.savez(folder / _FEATURES, **features)  # type: ignore[arg-type]


def _write_images(report: Report, folder: Path) -> None:
    from PIL import Image

    strips = {_strip_name(i): images for i, images in report.samples.items()}
    for name, group in report.groups.items():
        strips |= {_strip_name(i, name): images for i, images in group.samples.items()}
    for file, images in strips.items():
        Image.fromarray(np.concatenate(list(images), axis=1)).save(folder / file)
    if report.reference is not None:
        pairs_sheet(report.reference, report).save(folder / PAIRS)
        if sheet := groups_sheet(report.reference, report):
            sheet.save(folder / GROUPS_SHEET)


def _strip_name(prompt: int, group: str | None = None) -> str:
    return f"samples-{group}-{prompt:03d}.png" if group else f"samples-{prompt:03d}.png"


# ---- loading -------------------------------------------------------------------------------------


def load_report(folder: str | Path) -> Report:
    """Read a folder that `save_report` wrote.

    Raises:
        ValueError: the report is missing, damaged or incomplete, or of another format version.
    """
    folder = expand(folder)
    if not (folder / FILE).is_file():
        raise ValueError(f"there is no report in '{folder}': expected a file {FILE}")
    try:
        root = strict_json.loads((folder / FILE).read_text("utf-8"))
        if root["format"] == FORMAT:
            return _report(folder, root)
    except Exception as error:  # a damaged file may cause any
        raise ValueError(
            f"the report in '{folder}' is damaged or incomplete ({type(error).__name__}: "
            f"{error}): evaluate again"
        ) from error
    raise ValueError(
        f"the report in '{folder}' has format version {root['format']}, but this version of "
        f"diffusers-fair reads {FORMAT}: update diffusers-fair, or evaluate again"
    )


def page_of(folder: str | Path) -> Path:
    """Return the page of a report or a comparison.

    Raises:
        ValueError: the folder has none.
    """
    pages = [expand(folder) / name for name in (PAGE, COMPARISON_PAGE)]
    for page in pages:
        if page.is_file():
            return page
    raise ValueError(
        f"there is no page in '{folder}': expected a folder with {PAGE} or {COMPARISON_PAGE}, as "
        "`diffusers-fair evaluate` and `compare` write them"
    )


def _report(folder: Path, root: dict[str, Any]) -> Report:
    settings = _settings(root["settings"])
    lines = [strict_json.loads(x) for x in (folder / _RECORDS).read_text("utf-8").splitlines()]
    features = _features(folder / _FEATURES)

    def part(name: str | None, facts: Mapping[str, Any]) -> Any:
        """Read records and samples of a group, or of the neutral prompts."""
        of_group = [line for line in lines if line.get("group") == name]
        expected = facts["summary"]["images"]
        if len(of_group) != expected:
            raise ValueError(f"expected {expected} records, got {len(of_group)}")
        group_features = _features_of(features, name)
        return {
            "records": Records.from_lines(of_group, settings.attributes, group_features),
            "samples": {
                int(i): _strip(folder, int(i), n, name) for i, n in facts["samples"].items()
            },
        }

    return Report(
        label=root["label"],
        settings=settings,
        provenance=root["provenance"],
        confusion=root.get("confusion", {}),  # older reports have none
        groups={
            name: GroupReport(
                group=group_from_json(name, facts),
                attributes=settings.attributes,
                **part(name, facts),
            )
            for name, facts in root.get("groups", {}).items()  # older reports have none
        },
        **part(None, root),
    )


def _settings(root: Mapping[str, Any]) -> Settings:
    attributes = tuple(Attribute(**attribute) for attribute in root["attributes"])
    return Settings(**{**root, "attributes": attributes, "prompts": tuple(root["prompts"])})


def _features(file: Path) -> dict[str, np.ndarray]:
    """Read all features; a report without any has no such file."""
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def _features_of(features: Mapping[str, np.ndarray], group: str | None) -> dict[str, np.ndarray]:
    """Select the features of a group, or of the neutral prompts if `group` is None."""
    start = f"{group}/" if group else ""
    return {
        key.removeprefix(start): values
        for key, values in features.items()
        if key.startswith(start) and ("/" in key) == bool(group)
    }


def _strip(folder: Path, prompt: int, images: int, group: str | None) -> np.ndarray:
    """Read the images (n, h, w, 3) of a strip."""
    from PIL import Image

    return np.stack(np.split(np.array(Image.open(folder / _strip_name(prompt, group))), images, 1))


# ---- comparisons ---------------------------------------------------------------------------------


def save_comparison(comparison: Comparison, folder: str | Path) -> None:
    """Write compare.html, compare.json and compare.md.

    Args:
        comparison: comparison to save.
        folder: created if needed.

    Raises:
        ValueError: the folder is a file, or cannot be written to.
    """
    folder = require_writable(folder)
    texts = {
        COMPARISON_PAGE: comparison_page(comparison),
        "compare.json": strict_json.dumps(comparison.json(), indent=1, ensure_ascii=False),
        "compare.md": comparison_markdown(comparison),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
