"""Images with the adapter, and the original ones -> the loss to minimise (sections 4.1, 4.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_fair.attributes import Attribute
from diffusers_fair.evaluation import Judges
from diffusers_fair.evaluation.metrics import bias, frequencies
from diffusers_fair.faces import Faces, face_chips
from diffusers_fair.losses import alignment_loss, scale_gradient, semantics_loss
from diffusers_fair.targets import joint_targets


@dataclass(frozen=True, kw_only=True)
class Aim:
    """An attribute, and how it enters the loss."""

    attribute: Attribute
    threshold: float
    """C: targets less certain than this have no say, in [0, 1]."""
    cost: float = 1.0
    """Weight in the transport cost."""


@dataclass(frozen=True, kw_only=True)
class SemanticsWeights:
    """How much it matters that an image stays like the original one (equation 8)."""

    kept: float
    """lambda_1: where the original's classes are the target's already."""
    changed: float
    """lambda_2 / lambda_1: where a class is to change."""
    face: float
    """lambda_3 / lambda_2: there, inside the face."""


@dataclass(frozen=True)
class Originals:
    """What is kept of the original model's images o_i for one prompt and noise."""

    faces: Faces
    classes: dict[str, Tensor]
    """Attribute name -> (n,) class numbers; without meaning where no face was found."""
    features: tuple[Tensor, Tensor]
    """CLIP and DINO, (n, d) each, of unit length."""


class Objective:
    """Alignment loss and semantics loss of images of one prompt, as training's judges see them.

    Args:
        judges: face detector, classifiers and encoders.
        aims: the attributes to balance, jointly.
        weights: of the semantics loss; the alignment loss has weight 1.
    """

    def __init__(self, judges: Judges, aims: Sequence[Aim], weights: SemanticsWeights):
        self.judges = judges
        self.aims = aims
        self.weights = weights

    @torch.no_grad()
    def originals(self, images: Tensor) -> Originals:
        """Look at the original model's images (n, 3, h, w) in [-1, 1]."""
        faces = self.judges.face_detector(images)
        classes = {
            name: p.argmax(1) for name, p in self.probabilities(images, faces).items()
        }  # of every row: those without a face are left out later
        return Originals(faces, classes, self._features(images))

    def probabilities(self, images: Tensor, faces: Faces) -> dict[str, Tensor]:
        """Attribute name -> (n, classes), differentiable; classes in the attribute's order."""
        found = {}
        for aim in self.aims:
            classifier = self.judges.classifiers[aim.attribute.name]
            order = [classifier.classes.index(c) for c in aim.attribute.classes]
            chips = face_chips(images, faces, classifier.size)
            found[aim.attribute.name] = classifier(chips)[:, order]
        return found

    def __call__(self, images: Tensor, originals: Originals) -> tuple[Tensor, dict[str, float]]:
        """The loss of images (n, 3, h, w) in [-1, 1], and figures to log.

        Images without a face take no part in the alignment.
        """
        faces = self.judges.face_detector(images.detach())
        found = faces.found
        p = self.probabilities(images[found], faces[found])
        alignment = images.new_zeros(len(images))
        changes = torch.ones_like(found)
        if found.any():
            alignment[found], changes[found] = self._align(p, originals, found)
        semantics = self._semantics(images, faces, originals, changes)
        loss = (alignment + semantics).mean()
        figures = {"loss": loss, "alignment": alignment.mean(), "semantics": semantics.mean()}
        logged = {name: value.item() for name, value in figures.items()}
        return loss, logged | {"faces": found.float().mean().item()} | _biases(p)

    def _align(
        self, p: Mapping[str, Tensor], originals: Originals, found: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the m faces found: the alignment loss (m,), and whether a class is to change (m,)."""
        targets = joint_targets(
            list(p.values()),
            [aim.attribute.target for aim in self.aims],
            cost_weights=[aim.cost for aim in self.aims],
        )
        losses, differs = [], []
        for aim, target in zip(self.aims, targets, strict=True):
            name = aim.attribute.name
            losses.append(alignment_loss(p[name], target, aim.threshold))  # equation 6
            differs.append(target.labels != originals.classes[name][found])
        unseen = ~originals.faces.found[found]  # no face in the original: nothing agrees with it
        return torch.stack(losses).sum(0), torch.stack([*differs, unseen]).any(0)

    def _semantics(
        self, images: Tensor, faces: Faces, originals: Originals, changes: Tensor
    ) -> Tensor:
        """The weighted semantics loss (n,): less where a class changes, least on the face."""
        inside = _shared_face(faces, originals.faces, images) & changes[:, None, None]  # (n, h, w)
        images = scale_gradient(images, torch.where(inside, self.weights.face, 1.0)[:, None])
        pairs = zip(self._features(images), originals.features, strict=True)
        loss = sum(semantics_loss(x, o) for x, o in pairs)  # equation 7
        return self.weights.kept * torch.where(changes, self.weights.changed, 1.0) * loss

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.judges.clip(images), self.judges.dino(images)


def _shared_face(a: Faces, b: Faces, images: Tensor) -> Tensor:
    """(n, h, w) bool: inside both face boxes; nowhere if one has no face."""
    h, w = images.shape[-2:]
    low = torch.maximum(a.boxes[:, :2], b.boxes[:, :2])  # (n, 2)
    high = torch.minimum(a.boxes[:, 2:], b.boxes[:, 2:])
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (w, h))
    columns = (x >= low[:, :1]) & (x <= high[:, :1])  # (n, w)
    rows = (y >= low[:, 1:]) & (y <= high[:, 1:])  # (n, h)
    return rows[:, :, None] & columns[:, None, :] & (a.found & b.found)[:, None, None]


def _biases(p: Mapping[str, Tensor]) -> dict[str, float]:
    """'bias/NAME' -> bias of this batch; left out where no face was found."""
    counts = {name: torch.bincount(x.argmax(1), minlength=x.shape[1]) for name, x in p.items()}
    return {
        f"bias/{name}": float(bias(frequencies(n.numpy(force=True))))
        for name, n in counts.items()
        if n.sum()
    }
