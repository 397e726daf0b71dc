"""An evaluation and its folder.

Figures are functions of the records: a report that was loaded gives the same ones without
generating anything again.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.reports.groups import GroupReport, GroupSummary, group_from_json
from diffusers_fair.reports.images import groups_picture, pairs_picture
from diffusers_fair.reports.obedience import Shortfall, shortfalls
from diffusers_fair.reports.records import Records, Settings
from diffusers_fair.reports.summary import prompt_figures, summary_figures

FORMAT = 1
FILE, RECORDS, FEATURES = "report.json", "records.jsonl", "features.npz"
PAGE = "report.html"
PAIRS, GROUPS_SHEET = "pairs.png", "groups.png"  # the same noise without and with the adapter
SCORE_NAMES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
GAP = "-"  # in a table, where there is no figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """An evaluation: what was asked for, what was seen, and the figures that follow."""

    label: str
    """What was evaluated, as a column head."""
    settings: Settings
    records: Records
    samples: Mapping[int, np.ndarray] = field(repr=False)
    """Prompt -> its first images, (m, h, w, 3) uint8; of a few prompts."""
    provenance: Mapping[str, Any] = field(repr=False)
    """Command, versions, machine, time."""
    confusion: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict, repr=False)
    """Attribute -> how its classifier errs on pictures of known class: counts, a row for each true
    class and a column for each class seen, in the attribute's order; of those that tell it."""
    reference: "Report | None" = field(default=None, repr=False)
    """The base model's report that CLIP-I and DINO compare with; not saved."""
    groups: Mapping[str, GroupReport] = field(default_factory=dict, repr=False)
    """Name -> what was seen of a group of prompts that leave nothing to change."""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary_figures` of the records."""
        return summary_figures(self.settings, self.records, self.confusion)

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """`prompt_figures` of the records."""
        return prompt_figures(self.settings, self.records, self.confusion)

    def group_summaries(self, like: "Report | None" = None) -> dict[str, GroupSummary]:
        """Group -> its figures.

        Args:
            like: a report whose groups' prompts alone count; left out, all do. A group that it
                lacks, or that this report has not all images of, is left out.
        """
        if like is None:
            return {name: group.summary for name, group in self.groups.items()}
        found = {name: self.group_like(group) for name, group in like.groups.items()}
        return {name: group.summary for name, group in found.items() if group is not None}

    def group_like(self, group: GroupReport) -> GroupReport | None:
        """The images here of that group's prompts; None unless all are here."""
        mine = self.groups.get(group.group.name)
        return mine.of(group.group) if mine is not None and mine.covers(group.group) else None

    def shortfalls(self, base: "Report | None" = None) -> list[Shortfall]:
        """Where prompts that leave nothing to change are not left as the base model draws them.

        Args:
            base: the base model's report; left out, the reference.
        """
        base = base or self.reference
        return shortfalls(
            {} if base is None else base.group_summaries(self), self.group_summaries()
        )

    def of(self, attributes: Sequence[Attribute], images_per_prompt: int | None = None) -> "Report":
        """The same images, counted by other attributes or against other targets.

        Args:
            attributes: of those that were looked at. Prompts of groups that ask for any other are
                left out.
            images_per_prompt: how many of the images of each neutral prompt, the first; left out,
                all.

        Raises:
            ValueError: an attribute that was not looked at, or that has other classes; more images
                than there are.
        """
        looked = {a.name: (a.classes, a.region) for a in self.settings.attributes}
        for attribute in attributes:
            if looked.get(attribute.name) != (attribute.classes, attribute.region):
                raise ValueError(
                    f"the report looked at {looked}, not at '{attribute.name}' with classes "
                    f"{attribute.classes} ({attribute.region}): evaluate again with that attribute"
                )
        there = self.settings.images_per_prompt
        count = there if images_per_prompt is None else images_per_prompt
        if count > there:
            raise ValueError(f"the report has {there} images of each prompt, not {count}")
        settings = replace(self.settings, attributes=tuple(attributes), images_per_prompt=count)
        groups = {name: g.of_attributes(attributes) for name, g in self.groups.items()}
        return replace(
            self,
            settings=settings,
            records=self.records.rows(self.records.image < count),
            groups={name: group for name, group in groups.items() if group is not None},
        )

    def save(self, folder: str | Path) -> None:
        """Write report.json and .html, records.jsonl, features.npz, pictures; all or nothing.

        Args:
            folder: made if need be; may hold other things, but no report.

        Raises:
            ValueError: the folder holds a report, or is a file.
        """
        folder = require_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".report-") as partial:
            self._write(Path(partial))
            folder.mkdir(exist_ok=True)
            for file in sorted(Path(partial).iterdir(), key=lambda f: f.name == FILE):
                os.replace(file, folder / file.name)  # report.json last: it marks a whole report

    def _write(self, folder: Path) -> None:
        from PIL import Image

        from diffusers_fair.reports.page import report_page

        (folder / PAGE).write_text(report_page(self), "utf-8")
        (folder / FILE).write_text(json.dumps(self._json(), indent=1, ensure_ascii=False), "utf-8")
        neutral = self.records.lines(self.settings.attributes)
        lines = chain(neutral, *(group.lines() for group in self.groups.values()))
        (folder / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        features = dict(self.records.features)
        strips = {_strip_name(i): images for i, images in self.samples.items()}
        for name, group in self.groups.items():
            features |= {f"{name}/{key}": x for key, x in group.records.features.items()}
            strips |= {_strip_name(i, name): images for i, images in group.samples.items()}
        if features:
            np.savez(folder / FEATURES, **features)  # type: ignore[arg-type]
        for file, images in strips.items():
            Image.fromarray(np.concatenate(list(images), axis=1)).save(folder / file)
        if self.reference is not None:
            pairs_picture(self.reference, self).save(folder / PAIRS)
            if sheet := groups_picture(self.reference, self):
                sheet.save(folder / GROUPS_SHEET)

    def _json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "label": self.label,
            "settings": self.settings.json(),
            "confusion": self.confusion,
            "summary": self.summary,
            "groups": {name: group.json() for name, group in self.groups.items()},
            "reference": self.reference and self._json_of(self.reference),
            "prompts": self.prompts,
            "samples": {str(i): len(images) for i, images in self.samples.items()},
            "provenance": self.provenance,
        }

    def _json_of(self, reference: "Report") -> dict[str, Any]:
        """The reference's figures, of the groups' prompts that were measured here."""
        groups = reference.group_summaries(self).items()
        return {
            "summary": reference.summary,
            "groups": {name: {"summary": asdict(summary)} for name, summary in groups},
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read a folder that `save` wrote.

        Raises:
            ValueError: no report there, one of another format version, or an incomplete one.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise ValueError(f"there is no report in '{folder}': expected a file {FILE}")
        try:
            root = json.loads((folder / FILE).read_text("utf-8"))
            if root["format"] == FORMAT:
                return cls._from_folder(folder, root)
        except Exception as error:  # whatever a damaged file may cause
            raise ValueError(
                f"the report in '{folder}' is damaged or incomplete ({type(error).__name__}: "
                f"{error}): evaluate again"
            ) from error
        raise ValueError(
            f"the report in '{folder}' has format version {root['format']}, this version of "
            f"diffusers-fair reads {FORMAT}: update it, or evaluate again"
        )

    @classmethod
    def _from_folder(cls, folder: Path, root: dict[str, Any]) -> "Report":
        asked = root["settings"]
        attributes = tuple(Attribute(**attribute) for attribute in asked.pop("attributes"))
        prompts = tuple(asked.pop("prompts"))
        settings = Settings(prompts=prompts, attributes=attributes, **asked)
        lines = [json.loads(x) for x in (folder / RECORDS).read_text("utf-8").splitlines()]
        features: dict[str, np.ndarray] = {}
        if (folder / FEATURES).exists():
            with np.load(folder / FEATURES, allow_pickle=False) as stored:
                features = dict(stored)

        def part(name: str | None, facts: Mapping[str, Any]) -> Any:
            """Records and samples of a group, or of the neutral prompts."""
            mine = [line for line in lines if line.get("group") == name]
            expected = facts["summary"]["images"]
            if len(mine) != expected:
                raise ValueError(f"expected {expected} records, got {len(mine)}")
            start = f"{name}/" if name else ""
            kept = {
                key.removeprefix(start): x
                for key, x in features.items()
                if key.startswith(start) and ("/" in key) == bool(name)
            }
            samples = {int(i): _strip(folder, int(i), n, name) for i, n in facts["samples"].items()}
            return {"records": Records.from_lines(mine, attributes, kept), "samples": samples}

        return cls(
            label=root["label"],
            settings=settings,
            provenance=root["provenance"],
            confusion=root.get("confusion", {}),  # older reports have none
            groups={
                name: GroupReport(
                    group=group_from_json(name, facts), attributes=attributes, **part(name, facts)
                )
                for name, facts in root.get("groups", {}).items()  # older reports have none
            },
            **part(None, root),
        )


def require_free(folder: str | Path) -> Path:
    """Return the folder if a report can be saved there; to be asked before hours are spent.

    Raises:
        ValueError: the folder holds a report, or is a file.
    """
    folder = Path(folder)
    if (folder / FILE).exists():
        raise ValueError(f"'{folder}' holds a report already: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file: expected a folder to write the report to")
    return folder


def _strip_name(prompt: int, group: str | None = None) -> str:
    return f"samples-{group}-{prompt:03d}.png" if group else f"samples-{prompt:03d}.png"


def _strip(folder: Path, prompt: int, images: int, group: str | None) -> np.ndarray:
    """The images (n, h, w, 3) of a strip."""
    from PIL import Image

    return np.stack(np.split(np.array(Image.open(folder / _strip_name(prompt, group))), images, 1))
