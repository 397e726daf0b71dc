"""Loss of images of kept prompts: they should not change, and show the class that is named."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_fair import distributed
from diffusers_fair.attributes import Attribute
from diffusers_fair.objective.losses import alignment_loss
from diffusers_fair.objective.originals import Originals
from diffusers_fair.objective.parts import global_mean, in_micro_batches
from diffusers_fair.objective.semantics import Semantics
from diffusers_fair.objective.statistics import KeptStatistics
from diffusers_fair.objective.targets import Targets
from diffusers_fair.vision.judges import Judges


class KeptImages:
    """The semantics loss in full, as no class should change, and cross-entropy of named classes.

    Args:
        judges: judges of training.
        attributes: attributes to balance.
        semantics: the semantics loss.
    """

    def __init__(self, judges: Judges, attributes: Sequence[Attribute], semantics: Semantics):
        self.judges = judges
        self.attributes = attributes
        self.semantics = semantics

    def __call__(
        self,
        images: Tensor,
        originals: Originals,
        named_classes: Sequence[Mapping[str, str]],
        micro_batch: int | None = None,
    ) -> tuple[Tensor, KeptStatistics]:
        """Compute the loss of images (n, 3, h, w) in [-1, 1], and statistics.

        Args:
            images: images of this process, each with a prompt of its own.
            originals: judgements of the original images for the same prompts and noise.
            named_classes: attribute -> class that the prompt names, for each of these images.
            micro_batch: images to judge at a time; default: all.
        """
        labels = [_labels(a, named_classes).to(images.device) for a in self.attributes]

        def terms(x: Tensor) -> tuple[Tensor, Tensor]:
            return self._terms(images[x], originals[x], [label[x] for label in labels])

        parts = in_micro_batches(terms, images, micro_batch)
        losses, obeyed = (torch.cat(x) for x in zip(*parts, strict=True))  # (n,)
        loss, mean = global_mean(losses)
        obeyed = torch.cat(distributed.gather(obeyed))
        share = obeyed.nanmean().item() if obeyed.isfinite().any() else None
        return loss, KeptStatistics(loss=mean, obeyed=share)

    def _terms(
        self, images: Tensor, originals: Originals, labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss (n,), and whether an image shows the named classes (n,), NaN if none is named.

        `labels` are the named classes, (n,) for each attribute, -1 if none is named.
        """
        faces = self.judges.faces(images.detach())
        no_changes = faces.is_face.new_zeros(len(images), len(self.attributes))
        loss = self.semantics(images, faces, originals, no_changes)
        obeyed = images.new_full((len(images),), torch.inf)
        perceived = self.judges.perceive(self.attributes, images, faces)
        for attribute, label, p in zip(self.attributes, labels, perceived, strict=True):
            # a row of p is an image or a face
            rows = label[faces.image_index[faces.is_face]] if attribute.of_faces else label
            target = rows.clamp(min=0)
            cross_entropy = alignment_loss(p, _one_class(target, rows >= 0, p), 0.5)
            is_right = (p.argmax(1) == target).to(p)
            if attribute.of_faces:
                cross_entropy = faces.mean_per_image(cross_entropy)
                is_right = faces.mean_per_image(is_right)
            loss = loss + cross_entropy
            obeyed = torch.where(label >= 0, obeyed.minimum(is_right.detach()), obeyed)
        return loss, obeyed.masked_fill(obeyed.isinf(), torch.nan)


def _labels(attribute: Attribute, named_classes: Sequence[Mapping[str, str]]) -> Tensor:
    """(n,) index of the class that each image's prompt names; -1 if it names none."""
    names = [classes.get(attribute.name) for classes in named_classes]
    return torch.tensor([-1 if name is None else attribute.classes.index(name) for name in names])


def _one_class(labels: Tensor, is_named: Tensor, p: Tensor) -> Targets:
    """Targets with one certain class per row (m,); rows without a named class do not count."""
    return Targets(labels, is_named.to(p), functional.one_hot(labels, p.shape[1]).to(p), 0.0)
