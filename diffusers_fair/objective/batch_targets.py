"""Class probabilities of all images of a batch -> the targets of this process's images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_fair import distributed
from diffusers_fair.attributes import Attribute
from diffusers_fair.objective.statistics import (
    BatchStatistics,
    class_statistics,
    items_per_prompt,
)
from diffusers_fair.objective.target_feedback import TargetFeedback
from diffusers_fair.objective.targets import Targets, joined, region_targets
from diffusers_fair.vision.faces import Faces
from diffusers_fair.vision.judges import Judges


@dataclass(frozen=True)
class BatchTargets:
    """Target classes of this process's images."""

    faces: Faces
    """Faces of the n images."""
    targets: list[Targets]
    """For each attribute, targets of the m faces or of the n whole images."""
    of_faces: list[bool]
    """For each attribute, whether its targets are those of faces."""

    def __getitem__(self, images: Tensor) -> "BatchTargets":
        """Select images by their indices."""
        faces, rows = self.faces.of_images(images)
        face_index = self.faces.is_face.cumsum(0) - 1  # index of each row among the faces
        indices = face_index[rows][faces.is_face]
        pairs = zip(self.targets, self.of_faces, strict=True)
        targets = [target[indices if of_faces else images] for target, of_faces in pairs]
        return replace(self, faces=faces, targets=targets)


class TargetAssignment:
    """Assigns target classes within each prompt, over the images of all processes.

    Args:
        judges: judges of training.
        attributes: attributes to balance jointly.
        costs: weight of each attribute in the transport cost.
        feedback: attribute name -> feedback that shifts its target.
    """

    def __init__(
        self,
        judges: Judges,
        attributes: Sequence[Attribute],
        costs: Sequence[float],
        feedback: Mapping[str, TargetFeedback],
    ):
        self.judges = judges
        self.attributes = attributes
        self.costs = costs
        self.feedback = feedback

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], micro_batch: int | None
    ) -> tuple[BatchTargets, BatchStatistics]:
        """Judge this process's images; every process computes the targets of all (eq. 4-5).

        Args:
            images: (n, 3, h, w) of this process.
            prompts: prompts of the images of all processes.
            micro_batch: images to judge at a time.

        Returns:
            Targets of this process's images, and statistics of all images, without losses.
        """
        parts = images.split(micro_batch or len(images))
        faces = Faces.joined([self.judges.faces(part) for part in parts])
        local = self.judges.perceive(self.attributes, images, faces, micro_batch)
        gathered = [distributed.gather(p) for p in local]  # for each attribute, of each process
        everywhere = [torch.cat(p) for p in gathered]
        face_counts = torch.cat(distributed.gather(faces.counts))  # (images of all processes,)
        targets = []
        for target, p in zip(self.assign(everywhere, face_counts, prompts), gathered, strict=True):
            start = sum(len(rows) for rows in p[: distributed.rank()])
            rows = torch.arange(len(p[distributed.rank()])) + start
            targets.append(target[rows])
        of_faces = [attribute.of_faces for attribute in self.attributes]
        statistics = self._statistics(everywhere, face_counts, prompts)
        return BatchTargets(faces, targets, of_faces), statistics

    def assign(
        self, probabilities: Sequence[Tensor], faces: Tensor, prompts: Sequence[str]
    ) -> list[Targets]:
        """Assign targets for each attribute, within the images of each prompt.

        Args:
            probabilities: for each attribute (m, classes) of faces, or (n, classes) of images.
            faces: (n,) number of faces in each image.
            prompts: of the images.
        """
        whole = [not attribute.of_faces for attribute in self.attributes]
        sizes = [items_per_prompt(a, faces, len(prompts)) for a in self.attributes]
        split = (p.split(size) for p, size in zip(probabilities, sizes, strict=True))
        face_counts = faces.chunk(len(prompts))
        of_prompts = [
            region_targets(p, self._targets_of(prompt), counts, whole, cost_weights=self.costs)
            for prompt, p, counts in zip(
                prompts, zip(*split, strict=True), face_counts, strict=True
            )
        ]
        return [joined(parts) for parts in zip(*of_prompts, strict=True)]

    def _targets_of(self, prompt: str) -> list[Tensor]:
        """Return the training target of each attribute for a prompt, (classes,) each."""
        return [self.feedback[a.name].shifted(a.target_of(prompt)) for a in self.attributes]

    def _statistics(
        self, probabilities: Sequence[Tensor], faces: Tensor, prompts: Sequence[str]
    ) -> BatchStatistics:
        counted = {
            a.name: class_statistics(a, p, faces, prompts)
            for a, p in zip(self.attributes, probabilities, strict=True)
        }
        any_of_faces = any(attribute.of_faces for attribute in self.attributes)
        return BatchStatistics(
            losses={},
            face_rate=(faces > 0).float().mean().item() if any_of_faces else None,
            attributes={name: x for name, x in counted.items() if x is not None},
        )
