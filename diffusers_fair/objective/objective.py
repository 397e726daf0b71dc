"""The training loss of images, given the original ones (section 4.1).

Targets are assigned within each prompt, over the images of all processes. Everything else is
computed for all prompts at once, by each process for its own images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.config.schema import AttributeSection, LossesSection
from diffusers_fair.objective.batch_targets import BatchTargets, TargetAssignment
from diffusers_fair.objective.kept_images import KeptImages
from diffusers_fair.objective.losses import alignment_loss, face_realism_loss
from diffusers_fair.objective.originals import Originals
from diffusers_fair.objective.parts import global_mean, in_micro_batches
from diffusers_fair.objective.semantics import Semantics
from diffusers_fair.objective.statistics import BatchStatistics
from diffusers_fair.objective.target_feedback import TargetFeedback
from diffusers_fair.objective.targets import Targets
from diffusers_fair.vision.faces import Faces, match_faces
from diffusers_fair.vision.judges import Judges
from diffusers_fair.vision.reference_faces import ReferenceFaces


class Objective:
    """The training loss of images (section 4.1).

    Args:
        judges: face detector, classifiers and encoders.
        attributes: the recipe's sections for the attributes to balance jointly.
        losses: the recipe's weights of the losses other than the alignment loss.
        reference_faces: real faces to compare with; needed if the face realism loss has a weight.
        prompt_sets: prompt sets whose subjects the attributes' `targets` may name.

    Raises:
        ValueError: the face realism loss has a weight, but there are no reference faces.
    """

    def __init__(
        self,
        judges: Judges,
        attributes: Sequence[AttributeSection],
        losses: LossesSection,
        reference_faces: ReferenceFaces | None = None,
        *,
        prompt_sets: Iterable[str] = (),
    ):
        if losses.face and reference_faces is None:
            raise ValueError(
                f"a face weight of {losses.face:g} needs reference faces, got none: load them with "
                "backends.load_reference_faces, or set the weight to 0"
            )
        self.judges = judges
        self.sections = attributes
        self.attributes = [section.attribute(prompt_sets) for section in attributes]
        self.losses = losses
        self.reference_faces = reference_faces
        self.feedback = {
            a.name: TargetFeedback(a.target, section.target_feedback)
            for a, section in zip(self.attributes, attributes, strict=True)
        }
        costs = [section.cost for section in attributes]
        self.targets = TargetAssignment(judges, self.attributes, costs, self.feedback)
        self.semantics = Semantics(judges, attributes, losses.semantics)
        self.kept_images = KeptImages(judges, self.attributes, self.semantics)

    @torch.no_grad()
    def originals(self, images: Tensor, micro_batch: int | None = None) -> Originals:
        """Judge the original model's images (n, 3, h, w) in [-1, 1], in micro-batches."""
        parts = images.split(micro_batch or len(images))
        return Originals.joined([self._judge_originals(part) for part in parts])

    def _judge_originals(self, images: Tensor) -> Originals:
        faces = self.judges.faces(images)
        shown = images[faces.image_index]  # image of each row; placeholders are ignored later
        classes, is_certain = {}, torch.ones_like(faces.is_face)
        for attribute, section in zip(self.attributes, self.sections, strict=True):
            p = self.judges.probabilities(attribute, shown, faces)
            classes[attribute.name] = p.argmax(1)
            if attribute.of_faces:
                is_certain &= p.amax(1) >= section.threshold
        real = self.reference_faces
        embeddings = None if real is None else real.embed(shown, faces)
        return Originals(faces, classes, self.semantics.features(images), is_certain, embeddings)

    def __call__(
        self,
        images: Tensor,
        originals: Originals,
        prompts: Sequence[str] = ("",),
        micro_batch: int | None = None,
    ) -> tuple[Tensor, BatchStatistics]:
        """Compute the loss of images (n, 3, h, w) in [-1, 1], and the statistics of the batch.

        The loss is the weighted sum of `alignment`, `semantics` and, if it has a weight, `face`.
        Images without a face only contribute to the semantics loss. With several processes, the
        statistics are those of all images, and the loss is this process's part of the mean over all
        images: the parts sum to the loss that one process would have computed.

        Args:
            images: images of this process. Over all processes they are ordered by prompt, with the
                same number of images per prompt.
            originals: judgements of the original images for the same prompts and noise.
            prompts: prompts of the images of all processes.
            micro_batch: images to judge at a time; default: all. With gradients, each micro-batch
                is judged again in the backward pass, to save memory.
        """
        targets, statistics = self.targets(images.detach(), prompts, micro_batch)
        parts = in_micro_batches(
            lambda x: self._terms(images[x], originals[x], targets[x]), images, micro_batch
        )
        terms = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # (n,) each
        means = {name: global_mean(term)[1] for name, term in terms.items()}
        loss, mean = global_mean(torch.stack([*terms.values()]).sum(0))
        return loss, replace(statistics, losses={"loss": mean} | means)

    def _terms(
        self, images: Tensor, originals: Originals, targets: BatchTargets
    ) -> dict[str, Tensor]:
        """Weighted terms of the loss by name, (n,) each."""
        faces = targets.faces
        matches, is_matched = match_faces(faces, originals.faces)  # (m,)
        alignment, changes = self._align(
            images, faces, originals, matches, is_matched, targets.targets
        )
        terms = {
            "alignment": alignment,
            "semantics": self.semantics(images, faces, originals, changes),
        }
        if self.reference_faces is not None:
            stays = ~changes[:, targets.of_faces].any(1)  # (n,)
            is_kept = (
                originals.is_certain[matches] & stays[faces.image_index[faces.is_face]]
            )  # (m,)
            terms["face"] = self._realism(
                self.reference_faces, images, faces, originals, matches, is_kept
            )
        return terms

    def _align(
        self,
        images: Tensor,
        faces: Faces,
        originals: Originals,
        matches: Tensor,
        is_matched: Tensor,
        targets: Sequence[Targets],
    ) -> tuple[Tensor, Tensor]:
        """Alignment loss (n,), and which classes should change, (n, attributes) bool.

        The loss of an image with several faces is the mean of their losses, and its class should
        change if that of any of its faces should. An image without a face has no loss, and its
        class counts as one that should change. So does that of a face without an original face.

        Args:
            images: (n, 3, h, w).
            faces: faces of these images.
            originals: judgements of the original images.
            matches: (m,) row of the original face that corresponds to each face.
            is_matched: (m,) whether the original image has that face.
            targets: targets of each attribute.
        """
        first_row = torch.searchsorted(
            originals.faces.image_index, torch.arange(len(images)).to(matches)
        )
        perceived = self.judges.perceive(self.attributes, images, faces)
        losses, changes = [], []
        for i, attribute in enumerate(self.attributes):
            target, classes = targets[i], originals.classes[attribute.name]
            loss = alignment_loss(perceived[i], target, self.sections[i].threshold)
            labels = target.labels.to(classes.device)
            if attribute.of_faces:
                is_same = (labels == classes[matches]) & is_matched
                losses.append(faces.mean_per_image(loss))
                any_changes = faces.mean_per_image((~is_same).float()) > 0
                changes.append(any_changes | (faces.counts == 0))
            else:
                losses.append(loss)
                changes.append(labels != classes[first_row])
        return torch.stack(losses).sum(0), torch.stack(changes, 1)

    def _realism(
        self,
        real: ReferenceFaces,
        images: Tensor,
        faces: Faces,
        originals: Originals,
        matches: Tensor,
        is_kept: Tensor,
    ) -> Tensor:
        """Weighted face realism loss (n,), the mean over an image's faces; 0 without a face."""
        assert originals.embeddings is not None
        if not faces.is_face.any():
            return images.new_zeros(len(images))
        embeddings = real.embed(
            images[faces.image_index[faces.is_face]], faces[faces.is_face]
        )  # (m, d)
        original = originals.embeddings[matches]  # (m, d)
        loss = face_realism_loss(embeddings, real.embeddings, original, is_kept)  # (m,)
        return self.losses.face * faces.mean_per_image(loss)

    def update_targets(self, statistics: BatchStatistics) -> None:
        """Update the target feedback from the statistics of a batch."""
        for name, classes in statistics.attributes.items():
            self.feedback[name].update(classes.shares, classes.target)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: attribute name -> state of its target feedback."""
        return {name: feedback.state_dict() for name, feedback in self.feedback.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; the oldest checkpoints have none."""
        for name, feedback_state in state.items():
            self.feedback[name].load_state_dict(feedback_state)
