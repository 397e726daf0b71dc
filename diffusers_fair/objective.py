"""Images with the adapter, and the original ones -> the loss to minimise (section 4.1).

Targets are found among the images of one prompt; everything else is done for all prompts at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation import Judges
from diffusers_fair.evaluation.metrics import bias, frequencies
from diffusers_fair.faces import Faces, face_chips
from diffusers_fair.losses import (
    alignment_loss,
    face_realism_loss,
    scale_gradient,
    semantics_loss,
)
from diffusers_fair.real_faces import RealFaces
from diffusers_fair.targets import Targets, joined, joint_targets


@dataclass(frozen=True, kw_only=True)
class Aim:
    """An attribute, and how it enters the loss."""

    attribute: Attribute
    threshold: float
    """C: targets less certain than this have no say, in [0, 1]; a face is kept as it was only if
    its original's class is as likely."""
    cost: float = 1.0
    """Weight in the transport cost."""
    semantics_changed: float = 0.2
    """lambda_2 / lambda_1, in [0, 1]: likeness that is asked where the class is to change."""
    semantics_face: float = 0.2
    """lambda_3 / lambda_2, in [0, 1]: there, inside the face."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Of the losses beside the alignment loss, whose weight is 1."""

    semantics: float
    """lambda_img,1: where the original's classes are the target's already."""
    face: float = 0.0
    """lambda_face: of the distance to real faces."""


@dataclass(frozen=True)
class Originals:
    """What is kept of the original model's images o_i of the same prompts and noise."""

    faces: Faces
    classes: dict[str, Tensor]
    """Attribute name -> (n,) class numbers; without meaning where no face was found."""
    features: tuple[Tensor, Tensor]
    """CLIP and DINO, (n, d) each, of unit length."""
    sure: Tensor
    """(n,) bool: whether every attribute's class is at least as likely as its threshold."""
    embeddings: Tensor | None = None
    """Of the faces, (n, d), of unit length; as meaningless as the classes. None: not asked for."""


class Objective:
    """The loss of images, as training's judges see them (section 4.1).

    Args:
        judges: face detector, classifiers and encoders.
        aims: the attributes to balance, jointly.
        weights: of the semantics and the face realism loss.
        real_faces: what faces are compared with; needed if the face realism loss has a weight.

    Raises:
        ValueError: a weight for face realism, and no real faces.
    """

    def __init__(
        self,
        judges: Judges,
        aims: Sequence[Aim],
        weights: LossWeights,
        real_faces: RealFaces | None = None,
    ):
        if weights.face and real_faces is None:
            raise ValueError(
                f"a face weight of {weights.face:g} needs real faces, got none: load them with "
                "backends.load_real_faces, or set the weight to 0"
            )
        self.judges = judges
        self.aims = aims
        self.weights = weights
        self.real_faces = real_faces

    @torch.no_grad()
    def originals(self, images: Tensor) -> Originals:
        """Look at the original model's images (n, 3, h, w) in [-1, 1]."""
        faces = self.judges.face_detector(images)
        p = self.probabilities(images, faces)  # of every row: faceless ones are left out later
        sure = [p[aim.attribute.name].amax(1) >= aim.threshold for aim in self.aims]
        classes = {name: x.argmax(1) for name, x in p.items()}
        embeddings = None if self.real_faces is None else self.real_faces.embed(images, faces)
        return Originals(
            faces, classes, self._features(images), torch.stack(sure).all(0), embeddings
        )

    def probabilities(self, images: Tensor, faces: Faces) -> dict[str, Tensor]:
        """Attribute name -> (n, classes), differentiable; classes in the attribute's order."""
        found = {}
        for aim in self.aims:
            classifier = self.judges.classifiers[aim.attribute.name]
            order = [classifier.classes.index(c) for c in aim.attribute.classes]
            chips = face_chips(images, faces, classifier.size)
            found[aim.attribute.name] = classifier(chips)[:, order]
        return found

    def __call__(
        self, images: Tensor, originals: Originals, prompts: int = 1
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of images (n, 3, h, w) in [-1, 1], and figures to log.

        The loss is the sum of `alignment`, `semantics` and, if it is asked for, `face`, each with
        its weight. Images without a face take part in the semantics loss alone.

        Args:
            images: equally many of each prompt, prompt by prompt.
            originals: of the same prompts and noise.
            prompts: how many prompts there are.
        """
        faces = self.judges.face_detector(images.detach())
        found = faces.found
        p = self.probabilities(images[found], faces[found])
        sizes = [int(part.sum()) for part in found.chunk(prompts)]  # faces of each prompt
        alignment = images.new_zeros(len(images))
        differs = found.new_ones(len(images), len(self.aims))
        if found.any():
            alignment[found], differs[found] = self._align(p, originals, found, sizes)
        terms = {
            "alignment": alignment,
            "semantics": self._semantics(images, faces, originals, differs),
        }
        if self.real_faces is not None:
            kept = originals.sure & ~differs.any(1)
            terms["face"] = self._realism(self.real_faces, images, faces, originals, kept)
        loss = torch.stack([*terms.values()]).sum(0).mean()
        logged = {"loss": loss.item()} | {name: x.mean().item() for name, x in terms.items()}
        return loss, logged | {"faces": found.float().mean().item()} | _biases(p, sizes)

    def _align(
        self, p: Mapping[str, Tensor], originals: Originals, found: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Of the m faces found: the alignment loss (m,), and which classes are to change.

        The latter is (m, attributes) bool.
        """
        losses, differs = [], []
        for aim, target in zip(self.aims, self._targets(p, sizes), strict=True):
            name = aim.attribute.name
            losses.append(alignment_loss(p[name], target, aim.threshold))  # equation 6
            differs.append(target.labels != originals.classes[name][found])
        unseen = ~originals.faces.found[found]  # no face in the original: nothing agrees with it
        return torch.stack(losses).sum(0), torch.stack(differs, 1) | unseen[:, None]

    def _targets(self, p: Mapping[str, Tensor], sizes: Sequence[int]) -> list[Targets]:
        """Of each attribute, the targets of the m faces: those of each prompt among themselves."""
        target = [aim.attribute.target for aim in self.aims]
        cost = [aim.cost for aim in self.aims]
        of_prompts = [
            joint_targets(parts, target, cost_weights=cost)
            for parts in zip(*(x.split(sizes) for x in p.values()), strict=True)
            if len(parts[0])
        ]
        return [joined(parts) for parts in zip(*of_prompts, strict=True)]

    def _semantics(
        self, images: Tensor, faces: Faces, originals: Originals, differs: Tensor
    ) -> Tensor:
        """The weighted semantics loss (n,): less where a class changes, least on the face.

        Where several attributes of an image are to change, the smallest factor counts; without a
        face all of them are taken to.
        """
        changed = _smallest([aim.semantics_changed for aim in self.aims], differs)  # (n,)
        face = _smallest([aim.semantics_face for aim in self.aims], differs)[:, None, None]
        inside = _shared_face(faces, originals.faces, images)  # (n, h, w)
        images = scale_gradient(images, torch.where(inside, face, 1.0)[:, None])
        pairs = zip(self._features(images), originals.features, strict=True)
        loss = sum(semantics_loss(x, o) for x, o in pairs)  # equation 7
        return self.weights.semantics * changed * loss

    def _realism(
        self, real: RealFaces, images: Tensor, faces: Faces, originals: Originals, kept: Tensor
    ) -> Tensor:
        """The weighted face realism loss (n,); 0 without a face."""
        assert originals.embeddings is not None
        loss, found = images.new_zeros(len(images)), faces.found
        if found.any():
            embeddings = real.embed(images[found], faces[found])  # (m, d)
            own = originals.embeddings[found]
            loss[found] = face_realism_loss(embeddings, real.bank, own, kept[found])
        return self.weights.face * loss

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.judges.clip(images), self.judges.dino(images)


def _smallest(factors: Sequence[float], differs: Tensor) -> Tensor:
    """(n,): of the attributes that differ (n, attributes), the smallest factor; 1 if none does."""
    return torch.where(differs, torch.tensor(factors, device=differs.device), 1.0).amin(1)


def _shared_face(a: Faces, b: Faces, images: Tensor) -> Tensor:
    """(n, h, w) bool: inside both face boxes; nowhere if one has no face."""
    h, w = images.shape[-2:]
    low = torch.maximum(a.boxes[:, :2], b.boxes[:, :2])  # (n, 2)
    high = torch.minimum(a.boxes[:, 2:], b.boxes[:, 2:])
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (w, h))
    columns = (x >= low[:, :1]) & (x <= high[:, :1])  # (n, w)
    rows = (y >= low[:, 1:]) & (y <= high[:, 1:])  # (n, h)
    return rows[:, :, None] & columns[:, None, :] & (a.found & b.found)[:, None, None]


def _biases(p: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, float]:
    """'bias/NAME' -> mean over the prompts with a face; left out where none has one."""
    figures = {}
    for name, x in p.items():
        parts = [part.argmax(1) for part in x.split(sizes) if len(part)]
        counts = [torch.bincount(part, minlength=x.shape[1]).numpy(force=True) for part in parts]
        if counts:
            figures[f"bias/{name}"] = float(np.mean([bias(frequencies(n)) for n in counts]))
    return figures
