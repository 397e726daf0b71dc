"""Prompts that leave an adapter nothing to change: what was seen of them, and its figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffusers_fair import metrics
from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import KeptPrompt, PromptGroup
from diffusers_fair.reports.records import Records

OBEYED, PIXELS, THUMBNAIL = "obeyed", "pixels", "thumbnail"  # two scores and a feature


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and how sure it is."""

    mean: float
    std: float
    """Of these prompts, not an estimate for others."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the mean over prompts; None for one prompt."""
    n: int
    """Number of prompts."""

    @classmethod
    def over(cls, values: Sequence[float] | np.ndarray) -> "Estimate | None":
        """The mean of one value per prompt, NaN left out; None without any."""
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        if not len(finite):
            return None
        ends = metrics.bootstrap_interval(finite)
        interval = None if ends is None else (round(ends[0], 6), round(ends[1], 6))
        return cls(
            round(float(finite.mean()), 6), round(float(finite.std()), 6), interval, len(finite)
        )

    @classmethod
    def from_json(cls, root: Mapping[str, Any] | None) -> "Estimate | None":
        """The estimate that `asdict` gave."""
        if root is None:
            return None
        ends = root["interval"]
        return cls(root["mean"], root["std"], ends and (ends[0], ends[1]), root["n"])


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Figures of a group of prompts; None is a figure that no prompt has."""

    prompts: int
    images: int
    obeyed: Estimate | None
    """Share of images that show all that their prompt asks for, in the largest face; with people
    "all", mean over images of the share of faces that show it."""
    seen: Estimate | None
    """The same, of prompts with words of training, which are those of the kept prompts that an
    adapter was trained with."""
    unseen: Estimate | None
    """The same, of prompts with other words."""
    attributes: Mapping[str, Estimate]
    """Attribute -> share of images that show the class asked for, of prompts that ask for one."""
    clip_i: Estimate | None
    """Likeness to the base model's image of the same noise, by CLIP; 1 is the same."""
    dino: Estimate | None
    """Likeness to the base model's image of the same noise, by DINO; 1 is the same."""
    pixels: Estimate | None
    """Mean change of a pixel from the base model's image of the same noise, of 1; untouched
    prompts only."""

    @classmethod
    def from_json(cls, root: Mapping[str, Any]) -> "GroupSummary":
        """The summary that `asdict` gave."""
        names = ("obeyed", "seen", "unseen", "clip_i", "dino", "pixels")
        estimates = {name: Estimate.from_json(root[name]) for name in names}
        by_attribute = {
            name: found
            for name, part in root["attributes"].items()
            if (found := Estimate.from_json(part))
        }
        return cls(
            prompts=root["prompts"], images=root["images"], attributes=by_attribute, **estimates
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupReport:
    """What was seen of a group of prompts."""

    group: PromptGroup
    attributes: tuple[Attribute, ...]
    """Those that were looked at, in the classes' order of the records."""
    records: Records
    """Prompt by prompt, all images of each."""
    samples: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False)
    """Prompt -> its first images, (m, h, w, 3) uint8; of a few prompts."""

    @cached_property
    def summary(self) -> GroupSummary:
        """The figures that follow from the records."""
        unseen = np.array([prompt.unseen for prompt in self.group.prompts])
        whole = self.by_prompt(OBEYED)
        parts = obedience(self.group.prompts, self.attributes, self.records)
        by_attribute = {name: Estimate.over(self._means(values)) for name, values in parts.items()}
        return GroupSummary(
            prompts=len(self.group.prompts),
            images=len(self.records.prompt),
            obeyed=Estimate.over(whole),
            seen=Estimate.over(whole[~unseen]),
            unseen=Estimate.over(whole[unseen]),
            attributes={name: found for name, found in by_attribute.items() if found},
            clip_i=Estimate.over(self.by_prompt("clip_i")),
            dino=Estimate.over(self.by_prompt("dino")),
            pixels=Estimate.over(self.by_prompt(PIXELS)),
        )

    def by_prompt(self, score: str) -> np.ndarray:
        """Mean score of each prompt's images, (P,); NaN for a gap."""
        empty = np.full(len(self.records.prompt), np.nan)
        return self._means(self.records.scores.get(score, empty))

    def _means(self, values: np.ndarray) -> np.ndarray:
        """Means (P,) of values (n,) that all images of a prompt have, or none."""
        return values.reshape(len(self.group.prompts), -1).mean(1)

    def covers(self, group: PromptGroup) -> bool:
        """Whether all images of that group are here, judged by what its prompts ask for."""
        known, looked = self._index(), {a.name for a in self.attributes}
        return group.images_per_prompt <= self.group.images_per_prompt and all(
            (p.text, p.negative) in known and looked.issuperset(p.asks) for p in group.prompts
        )

    def of(self, group: PromptGroup) -> "GroupReport":
        """The same images, of that group's prompts and number of images alone.

        Raises:
            ValueError: images that are not here.
        """
        if group == self.group:
            return self
        if not self.covers(group):
            raise ValueError(
                f"the report has not all images of prompt group '{group.name}': evaluate again"
            )
        known, count = self._index(), group.images_per_prompt
        old = np.array([known[p.text, p.negative] for p in group.prompts])  # (P,)
        rows = old[:, None] * self.group.images_per_prompt + np.arange(count)
        records = replace(
            self.records.rows(rows.ravel()), prompt=np.repeat(np.arange(len(old)), count)
        )
        return GroupReport(
            group=group,
            attributes=self.attributes,
            records=with_obeyed(records, group.prompts, self.attributes),
            samples={
                i: self.samples[j][:count] for i, j in enumerate(old.tolist()) if j in self.samples
            },
        )

    def of_attributes(self, attributes: Sequence[Attribute]) -> "GroupReport | None":
        """The images of prompts that ask for these attributes alone; None without any."""
        names = {attribute.name for attribute in attributes}
        kept = tuple(p for p in self.group.prompts if names.issuperset(p.asks))
        if not kept:
            return None
        return replace(self.of(replace(self.group, prompts=kept)), attributes=tuple(attributes))

    def _index(self) -> dict[tuple[str, str], int]:
        return {(p.text, p.negative): i for i, p in enumerate(self.group.prompts)}

    def json(self) -> dict[str, Any]:
        """What report.json says of the group; records and pictures are elsewhere."""
        return {
            "images_per_prompt": self.group.images_per_prompt,
            "prompts": [asdict(prompt) for prompt in self.group.prompts],
            "summary": asdict(self.summary),
            "samples": {str(i): len(images) for i, images in self.samples.items()},
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """One JSON object per image, without the features."""
        for line in self.records.lines(self.attributes):
            yield {"group": self.group.name, **line}


def group_from_json(name: str, root: Mapping[str, Any]) -> PromptGroup:
    """The group that `GroupReport.json` told."""
    prompts = tuple(KeptPrompt(**prompt) for prompt in root["prompts"])
    return PromptGroup(name, prompts, root["images_per_prompt"])


def summaries_from_json(root: Mapping[str, Any]) -> dict[str, GroupSummary]:
    """Group -> its summary, as a report.json or its reference tells them; older ones tell none."""
    return {
        name: GroupSummary.from_json(group["summary"])
        for name, group in root.get("groups", {}).items()
    }


def obedience(
    prompts: Sequence[KeptPrompt], attributes: Sequence[Attribute], records: Records
) -> dict[str, np.ndarray]:
    """Attribute -> how far each image shows the class asked for, (n,), as `share_obeyed` gives it.

    NaN where the prompt asks for no class of the attribute.
    """
    return {a.name: share_obeyed(prompts, [a], records) for a in attributes}


def share_obeyed(
    prompts: Sequence[KeptPrompt], attributes: Sequence[Attribute], records: Records
) -> np.ndarray:
    """Share (n,) of an image's faces that are perceived as every class that its prompt asks for.

    With people "largest" the largest face alone counts, so the share is 0 or 1; with "all" every
    face does. The share is 0 without a face, if an attribute of faces is asked for. If only
    attributes of whole images are, it is 1 or 0. NaN where the prompt asks for no class.
    """
    faces = _every_face(records.found, records.others_found)  # (n, 1 + k)
    right = np.ones_like(faces)
    is_asked, of_faces = np.zeros((2, len(faces)), bool)  # (n,) each
    for a in attributes:
        classes = [a.classes.index(p.asks[a.name]) if a.name in p.asks else -1 for p in prompts]
        label = np.array(classes)[records.prompt]  # (n,)
        others = records.others_probabilities.get(a.name)
        perceived = _every_face(
            records.probabilities[a.name].argmax(-1), None if others is None else others.argmax(-1)
        )  # (n, 1 + k), or (n, 1) of whole images
        right &= (perceived == label[:, None]) | (label < 0)[:, None]
        is_asked |= label >= 0
        of_faces |= (label >= 0) & a.of_faces
    counted = np.where(of_faces[:, None], faces, np.arange(faces.shape[1]) == 0)
    share = (right & counted).sum(1) / np.maximum(counted.sum(1), 1)
    return np.where(is_asked, np.round(share, 6), np.nan)


def _every_face(largest: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Values (n,) of the largest faces before those (n, k) of the others, (n, 1 + k)."""
    return np.column_stack([largest] if others is None else [largest, others])


def with_obeyed(
    records: Records, prompts: Sequence[KeptPrompt], attributes: Sequence[Attribute]
) -> Records:
    """The records with the score "obeyed", as `share_obeyed` gives it for all attributes."""
    scores = {**records.scores, OBEYED: share_obeyed(prompts, attributes, records)}
    return replace(records, scores=scores)


def pixel_change(thumbnails: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean absolute difference of thumbnails (n, d) in 0 to 255, as a share of 1, (n,)."""
    return np.abs(thumbnails.astype(float) - reference.astype(float)).mean(-1) / 255
