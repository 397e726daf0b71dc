"""Images with the adapter, and the original ones -> the loss to minimise (section 4.1).

Targets are found among the images of one prompt, those of all processes; everything else is done
for all prompts at once, in each process for its own images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_fair import processes
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
from diffusers_fair.steering import Steering
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
    steering: float = 0.0
    """Gain by which the target moves against a gap that lasts; 0: it stays."""
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

    def __getitem__(self, rows: Tensor) -> "Originals":
        """The same for some of the images."""
        return Originals(
            self.faces[rows],
            {name: numbers[rows] for name, numbers in self.classes.items()},
            (self.features[0][rows], self.features[1][rows]),
            self.sure[rows],
            None if self.embeddings is None else self.embeddings[rows],
        )


@dataclass(frozen=True)
class Sought:
    """What the images of this process should become, and what was seen in those of all."""

    faces: Faces
    """Of this process's n images."""
    targets: list[Targets]
    """Of each attribute, for the m faces found here; empty if no process found one."""
    figures: dict[str, float]
    """To log."""

    def __getitem__(self, rows: Tensor) -> "Sought":
        """The same for some of the images."""
        before = self.faces.found.cumsum(0) - 1  # (n,), place among the faces
        there = before[rows][self.faces.found[rows]]
        return replace(
            self, faces=self.faces[rows], targets=[_some(t, there) for t in self.targets]
        )


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
        self.steering = {
            aim.attribute.name: Steering(aim.attribute.target, aim.steering) for aim in aims
        }

    @torch.no_grad()
    def originals(self, images: Tensor, micro_batch: int | None = None) -> Originals:
        """Look at the original model's images (n, 3, h, w) in [-1, 1], so many at a time."""
        return _joined([self._original(part) for part in images.split(micro_batch or len(images))])

    def _original(self, images: Tensor) -> Originals:
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
        self,
        images: Tensor,
        originals: Originals,
        prompts: Sequence[str] = ("",),
        micro_batch: int | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of images (n, 3, h, w) in [-1, 1], and figures to log.

        The loss is the sum of `alignment`, `semantics` and, if it is asked for, `face`, each with
        its weight. Images without a face take part in the semantics loss alone. With several
        processes, the figures are of the images of all, and the loss is the part of this process
        in their mean: the sum of all parts is what one process would have found.

        Args:
            images: of this process; of all together equally many of each prompt, prompt by prompt.
            originals: of the same prompts and noise.
            prompts: of all processes.
            micro_batch: images that the judges see at a time; left out, all. With a gradient they
                see them twice, and keep nothing of the first time.
        """
        sought = self._seek(images.detach(), prompts, micro_batch)
        parts = torch.arange(len(images), device=images.device).split(micro_batch or len(images))
        if len(parts) == 1:
            terms = self._terms(images, originals, sought)
        else:
            pieces = [
                checkpoint(self._terms, images[x], originals[x], sought[x], use_reentrant=False)
                for x in parts
            ]
            terms = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        total = torch.stack([*terms.values()]).sum(0)  # (n,)
        every = {name: torch.cat(processes.gather(x)) for name, x in terms.items()}
        whole = torch.cat(processes.gather(total))
        logged = {name: x.mean().item() for name, x in ({"loss": whole} | every).items()}
        return total.mean() * (len(total) / len(whole)), logged | sought.figures

    def steer(self, figures: Mapping[str, float]) -> None:
        """Move the targets by what was logged of an iteration; without a face they stay."""
        for aim in self.aims:
            name, classes = aim.attribute.name, aim.attribute.classes
            shares, target = (
                [figures[f"{kind}/{name}/{c}"] for c in classes if f"{kind}/{name}/{c}" in figures]
                for kind in ("share", "target")
            )
            if shares:
                self.steering[name].record(shares, target or None)

    def steering_state(self) -> dict[str, Any]:
        """Attribute name -> state, for a checkpoint."""
        return {name: steering.state() for name, steering in self.steering.items()}

    def take_steering(self, state: Mapping[str, Any]) -> None:
        """Be where a checkpoint was; one of an older version has nothing of it."""
        for name, each in state.items():
            self.steering[name].take(each)

    @torch.no_grad()
    def _seek(self, images: Tensor, prompts: Sequence[str], micro_batch: int | None) -> Sought:
        """Find the targets among the faces of all processes; each computes them all (eq. 4-5)."""
        size = micro_batch or len(images)
        faces = _joined_faces([self.judges.face_detector(part) for part in images.split(size)])
        shown, there = images[faces.found], faces[faces.found]
        rows = torch.arange(len(shown), device=images.device).split(size)
        own = [self.probabilities(shown[x], there[x]) for x in rows]
        parts = {name: processes.gather(torch.cat([p[name] for p in own])) for name in own[0]}
        p = {name: torch.cat(x) for name, x in parts.items()}  # of the faces of all
        found = torch.cat(processes.gather(faces.found))
        sizes = [int(part.sum()) for part in found.chunk(len(prompts))]  # faces of each prompt
        before = [len(x) for x in next(iter(parts.values()))[: processes.number()]]
        mine = torch.arange(len(shown), device=images.device) + sum(before)
        targets = [_some(target, mine) for target in self._targets(p, sizes, prompts)]
        figures = self._figures(p, sizes) | self._wanted(sizes, prompts)
        return Sought(faces, targets, {"faces": found.float().mean().item()} | figures)

    def _terms(self, images: Tensor, originals: Originals, sought: Sought) -> dict[str, Tensor]:
        """Name -> each image's term of the loss (n,), with its weight."""
        faces, found = sought.faces, sought.faces.found
        alignment = images.new_zeros(len(images))
        differs = found.new_ones(len(images), len(self.aims))
        if found.any():
            p = self.probabilities(images[found], faces[found])
            alignment[found], differs[found] = self._align(p, originals, found, sought.targets)
        terms = {
            "alignment": alignment,
            "semantics": self._semantics(images, faces, originals, differs),
        }
        if self.real_faces is not None:
            kept = originals.sure & ~differs.any(1)
            terms["face"] = self._realism(self.real_faces, images, faces, originals, kept)
        return terms

    def _figures(self, p: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, float]:
        """Of each attribute, for faces (m, classes), prompt by prompt; none where there are none.

        'bias/NAME' is the mean over the prompts with a face, 'largest/NAME' the share of the class
        that most faces of all prompts are of, 'share/NAME/CLASS' that of each class.
        """
        figures = {}
        for aim in self.aims:
            name, x = aim.attribute.name, p[aim.attribute.name]
            parts = [part.argmax(1) for part in x.split(sizes) if len(part)]
            counts = [torch.bincount(y, minlength=x.shape[1]).numpy(force=True) for y in parts]
            if counts:
                figures[f"bias/{name}"] = float(np.mean([bias(frequencies(n)) for n in counts]))
                shares = frequencies(np.sum(counts, axis=0))  # (classes,)
                figures[f"largest/{name}"] = float(shares.max())
                for c, share in zip(aim.attribute.classes, shares, strict=True):
                    figures[f"share/{name}/{c}"] = float(share)
        return figures

    def _wanted(self, sizes: Sequence[int], prompts: Sequence[str]) -> dict[str, float]:
        """'target/NAME/CLASS', the mean target of the faces; where prompts have their own."""
        own = [aim.attribute for aim in self.aims if aim.attribute.targets and sum(sizes)]
        return {
            f"target/{a.name}/{c}": float(share)
            for a in own
            for c, share in zip(
                a.classes,
                np.average([a.target_of(prompt) for prompt in prompts], axis=0, weights=sizes),
                strict=True,
            )
        }

    def _align(
        self,
        p: Mapping[str, Tensor],
        originals: Originals,
        found: Tensor,
        targets: Sequence[Targets],
    ) -> tuple[Tensor, Tensor]:
        """Of the m faces found: the alignment loss (m,), and which classes are to change.

        The latter is (m, attributes) bool.
        """
        losses, differs = [], []
        for aim, target in zip(self.aims, targets, strict=True):
            name = aim.attribute.name
            losses.append(alignment_loss(p[name], target, aim.threshold))  # equation 6
            differs.append(target.labels != originals.classes[name][found])
        unseen = ~originals.faces.found[found]  # no face in the original: nothing agrees with it
        return torch.stack(losses).sum(0), torch.stack(differs, 1) | unseen[:, None]

    def _targets(
        self, p: Mapping[str, Tensor], sizes: Sequence[int], prompts: Sequence[str]
    ) -> list[Targets]:
        """Of each attribute, the targets of the m faces: those of each prompt among themselves."""
        cost = [aim.cost for aim in self.aims]
        faces = zip(*(x.split(sizes) for x in p.values()), strict=True)
        of_prompts = [
            joint_targets(parts, self._target_of(prompt), cost_weights=cost)
            for prompt, parts in zip(prompts, faces, strict=True)
            if len(parts[0])
        ]
        return [joined(parts) for parts in zip(*of_prompts, strict=True)]

    def _target_of(self, prompt: str) -> list[Tensor]:
        """Of each attribute, where training aims for a prompt, (classes,)."""
        return [
            self.steering[aim.attribute.name].moved(aim.attribute.target_of(prompt))
            for aim in self.aims
        ]

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


def _some(target: Targets, rows: Tensor) -> Targets:
    """The targets of some of the faces."""
    return replace(
        target,
        labels=target.labels[rows],
        confidence=target.confidence[rows],
        plan=target.plan[rows],
    )


def _joined_faces(parts: Sequence[Faces]) -> Faces:
    marks = [part.landmarks for part in parts if part.landmarks is not None]
    return Faces(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.found for part in parts]),
        torch.cat(marks) if marks else None,
    )


def _joined(parts: Sequence[Originals]) -> Originals:
    """One after the other."""
    faces = [part.embeddings for part in parts if part.embeddings is not None]
    clip, dino = (torch.cat(list(x)) for x in zip(*(part.features for part in parts), strict=True))
    return Originals(
        _joined_faces([part.faces for part in parts]),
        {name: torch.cat([part.classes[name] for part in parts]) for name in parts[0].classes},
        (clip, dino),
        torch.cat([part.sure for part in parts]),
        torch.cat(faces) if faces else None,
    )
