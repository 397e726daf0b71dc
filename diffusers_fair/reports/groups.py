"""Reports on groups of control prompts, whose images an adapter should not change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffusers_fair.attributes import Attribute
from diffusers_fair.prompts.groups import KeptPrompt, PromptGroup
from diffusers_fair.reports.estimate import Estimate
from diffusers_fair.reports.records import Records

OBEYED, PIXELS, THUMBNAIL = "obeyed", "pixels", "thumbnail"  # two scores and a feature


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Estimates over the prompts of a group; None if no prompt has the value.

    In report.json it is stored as `dataclasses.asdict` returns it.
    """

    prompts: int
    images: int
    obeyed: Estimate | None
    """Share of images whose largest face shows every class that the prompt asks for. With
    `people: all`, the mean over images of the share of faces that do."""
    seen: Estimate | None
    """The same for prompts whose words are those of the kept prompts in training."""
    unseen: Estimate | None
    """The same for prompts with other words."""
    attributes: Mapping[str, Estimate]
    """Attribute -> share of images that show its class, over prompts that ask for one."""
    clip_i: Estimate | None
    """CLIP similarity to the base model's image from the same noise; 1 means identical."""
    dino: Estimate | None
    """DINO similarity to the base model's image from the same noise; 1 means identical."""
    pixels: Estimate | None
    """Mean pixel change, in [0, 1], from the base model's image from the same noise; for untouched
    prompts only."""

    @classmethod
    def from_json(cls, root: Mapping[str, Any]) -> "GroupSummary":
        """Read what `dataclasses.asdict` returned."""
        names = ("obeyed", "seen", "unseen", "clip_i", "dino", "pixels")
        estimates = {name: Estimate.from_json(root[name]) for name in names}
        by_attribute = {
            name: estimate
            for name, part in root["attributes"].items()
            if (estimate := Estimate.from_json(part))
        }
        return cls(
            prompts=root["prompts"], images=root["images"], attributes=by_attribute, **estimates
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupReport:
    """The records of the images of a group of prompts."""

    group: PromptGroup
    attributes: tuple[Attribute, ...]
    """The evaluated attributes, with their classes in the records' order."""
    records: Records
    """Prompt by prompt, all images of each."""
    samples: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False)
    """Prompt -> its first images, (m, h, w, 3) uint8; for a few prompts."""

    @cached_property
    def summary(self) -> GroupSummary:
        """Estimates over the prompts, computed from the records."""
        unseen = np.array([prompt.unseen for prompt in self.group.prompts])
        obeyed = self.by_prompt(OBEYED)
        shares = {
            a.name: _share_obeyed(self.group.prompts, [a], self.records) for a in self.attributes
        }
        by_attribute = {name: Estimate.over(self._means(values)) for name, values in shares.items()}
        return GroupSummary(
            prompts=len(self.group.prompts),
            images=len(self.records.prompt),
            obeyed=Estimate.over(obeyed),
            seen=Estimate.over(obeyed[~unseen]),
            unseen=Estimate.over(obeyed[unseen]),
            attributes={name: part for name, part in by_attribute.items() if part},
            clip_i=Estimate.over(self.by_prompt("clip_i")),
            dino=Estimate.over(self.by_prompt("dino")),
            pixels=Estimate.over(self.by_prompt(PIXELS)),
        )

    def by_prompt(self, score: str) -> np.ndarray:
        """Return the mean score of each prompt's images, (P,); NaN if they have none."""
        empty = np.full(len(self.records.prompt), np.nan)
        return self._means(self.records.scores.get(score, empty))

    def _means(self, values: np.ndarray) -> np.ndarray:
        """Average over the images of each prompt: (n,) -> (P,)."""
        return values.reshape(len(self.group.prompts), -1).mean(1)

    def covers(self, group: PromptGroup) -> bool:
        """Whether the report has all images of the group, and the attributes that it asks for."""
        known, evaluated = self._index(), {a.name for a in self.attributes}
        return group.images_per_prompt <= self.group.images_per_prompt and all(
            (p.text, p.negative) in known and evaluated.issuperset(p.expected_classes)
            for p in group.prompts
        )

    def select(self, group: PromptGroup) -> "GroupReport":
        """Restrict the report to the prompts and the number of images of that group.

        Raises:
            ValueError: the report lacks some of the images.
        """
        if group == self.group:
            return self
        if not self.covers(group):
            raise ValueError(
                f"the report lacks images of the prompt group '{group.name}': evaluate again"
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

    def select_attributes(self, attributes: Sequence[Attribute]) -> "GroupReport | None":
        """Restrict the report to prompts that ask only for these attributes; None if none does."""
        names = {attribute.name for attribute in attributes}
        kept = tuple(p for p in self.group.prompts if names.issuperset(p.expected_classes))
        if not kept:
            return None
        return replace(self.select(replace(self.group, prompts=kept)), attributes=tuple(attributes))

    def _index(self) -> dict[tuple[str, str], int]:
        return {(p.text, p.negative): i for i, p in enumerate(self.group.prompts)}

    def json(self) -> dict[str, Any]:
        """Return the JSON object in report.json, without records and images."""
        return {
            "images_per_prompt": self.group.images_per_prompt,
            "prompts": [asdict(prompt) for prompt in self.group.prompts],
            "summary": asdict(self.summary),
            "samples": {str(i): len(images) for i, images in self.samples.items()},
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield one JSON object per image, without the features."""
        for line in self.records.lines(self.attributes):
            yield {"group": self.group.name, **line}


def group_from_json(name: str, root: Mapping[str, Any]) -> PromptGroup:
    """Read the group that `GroupReport.json` wrote."""
    prompts = tuple(KeptPrompt(**prompt) for prompt in root["prompts"])
    return PromptGroup(name, prompts, root["images_per_prompt"])


def summaries_from_json(root: Mapping[str, Any]) -> dict[str, GroupSummary]:
    """Read the summaries of the groups in a report.json or its reference; older ones have none."""
    return {
        name: GroupSummary.from_json(group["summary"])
        for name, group in root.get("groups", {}).items()
    }


def _share_obeyed(
    prompts: Sequence[KeptPrompt], attributes: Sequence[Attribute], records: Records
) -> np.ndarray:
    """Compute the share (n,) of each image's faces that show every class its prompt asks for.

    With `people: largest` only the largest face counts, so the share is 0 or 1; with `people: all`
    every face counts. If the prompt asks for an attribute of faces, an image without a face has the
    share 0. If it asks only for attributes of whole images, the share is 0 or 1. It is NaN if the
    prompt asks for no class.
    """
    faces = _every_face(records.found, records.others_found)  # (n, 1 + k)
    right = np.ones_like(faces)
    is_asked, of_faces = np.zeros((2, len(faces)), bool)  # (n,) each
    for a in attributes:
        classes = [
            a.classes.index(p.expected_classes[a.name]) if a.name in p.expected_classes else -1
            for p in prompts
        ]
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
    """Put the values (n,) of the largest faces before those (n, k) of the others: (n, 1 + k)."""
    return np.column_stack([largest] if others is None else [largest, others])


def with_obeyed(
    records: Records, prompts: Sequence[KeptPrompt], attributes: Sequence[Attribute]
) -> Records:
    """Add the score "obeyed": `_share_obeyed` for all attributes."""
    scores = {**records.scores, OBEYED: _share_obeyed(prompts, attributes, records)}
    return replace(records, scores=scores)


def pixel_change(thumbnails: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean absolute difference in [0, 1] of thumbnails (n, d) with values 0 to 255: (n,)."""
    return np.abs(thumbnails.astype(float) - reference.astype(float)).mean(-1) / 255
