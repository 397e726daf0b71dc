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
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffusers_fair import distributed
from diffusers_fair.attributes import Attribute
from diffusers_fair.metrics import bias, frequencies
from diffusers_fair.objective.losses import (
    alignment_loss,
    face_realism_loss,
    scale_gradient,
    semantics_loss,
)
from diffusers_fair.objective.target_feedback import Steering
from diffusers_fair.objective.targets import Targets, joined, region_targets
from diffusers_fair.vision.faces import Faces, overlap
from diffusers_fair.vision.judges import Judges
from diffusers_fair.vision.reference_faces import RealFaces


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
    """lambda_3 / lambda_2, in [0, 1]: there, inside the face; not used for whole images."""


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
    """Attribute name -> class numbers, one for each row of the faces, (n,) where each image has
    one; without meaning where no face was found, unless the attribute is of the whole image."""
    features: tuple[Tensor, Tensor]
    """CLIP and DINO, (n, d) each, of unit length."""
    sure: Tensor
    """Of the same rows, bool: whether the classes of faces are all as likely as their threshold."""
    embeddings: Tensor | None = None
    """Of the same rows, (n, d), of unit length. None: not asked for."""

    def __getitem__(self, images: Tensor) -> "Originals":
        """The same for some of the images."""
        faces, rows = self.faces.of_images(images)
        return Originals(
            faces,
            {name: numbers[rows] for name, numbers in self.classes.items()},
            (self.features[0][images], self.features[1][images]),
            self.sure[rows],
            None if self.embeddings is None else self.embeddings[rows],
        )


@dataclass(frozen=True)
class Sought:
    """What the images of this process should become, and what was seen in those of all."""

    faces: Faces
    """Of this process's n images."""
    targets: list[Targets]
    """Of each attribute, for the m faces found here or, of whole images, for the n images."""
    of_faces: list[bool]
    """Which of the two, for each attribute."""
    figures: dict[str, float]
    """To log."""

    def __getitem__(self, images: Tensor) -> "Sought":
        """The same for some of the images."""
        faces, rows = self.faces.of_images(images)
        before = self.faces.found.cumsum(0) - 1  # place among the faces
        there = before[rows][faces.found]
        chosen = zip(self.targets, self.of_faces, strict=True)
        return replace(
            self, faces=faces, targets=[_some(t, there if f else images) for t, f in chosen]
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
        faces = self.judges.faces(images)
        shown = images[faces.owner]  # of every row: faceless ones are left out later
        classes, sure = {}, torch.ones_like(faces.found)
        for aim in self.aims:
            p = self.judges.probabilities(aim.attribute, shown, faces)
            classes[aim.attribute.name] = p.argmax(1)
            if aim.attribute.of_faces:
                sure &= p.amax(1) >= aim.threshold
        embeddings = None if self.real_faces is None else self.real_faces.embed(shown, faces)
        return Originals(faces, classes, self._features(images), sure, embeddings)

    def _perceived(
        self, images: Tensor, faces: Faces, micro_batch: int | None = None
    ) -> list[Tensor]:
        """Probabilities for each attribute, of the m faces found or of the n whole images.

        Each is (m or n, classes) in the attribute's order, differentiable.
        """
        shown, there = images[faces.owner[faces.found]], faces[faces.found]
        size = micro_batch or len(images)

        def parts(a: Attribute) -> list[Tensor]:
            if not a.of_faces:
                return [self.judges.probabilities(a, x, there) for x in images.split(size)]
            if not len(shown):
                return [images.new_zeros(0, len(a.classes))]
            rows = torch.arange(len(shown), device=images.device).split(size)
            return [self.judges.probabilities(a, shown[x], there[x]) for x in rows]

        return [torch.cat(parts(aim.attribute)) for aim in self.aims]

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
        every = {name: torch.cat(distributed.gather(x)) for name, x in terms.items()}
        whole = torch.cat(distributed.gather(total))
        logged = {name: x.mean().item() for name, x in ({"loss": whole} | every).items()}
        return total.mean() * (len(total) / len(whole)), logged | sought.figures

    def keep(
        self,
        images: Tensor,
        originals: Originals,
        asked: Sequence[Mapping[str, str]],
        micro_batch: int | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of images of kept prompts (n, 3, h, w) in [-1, 1], and figures to log.

        All of the semantics loss, as nothing is to change, and the alignment loss with a target of
        one class, where the prompt asks for one.

        Args:
            images: of this process, each of a prompt of its own.
            originals: of the same prompts and noise.
            asked: for each of these images attribute -> the class that its prompt asks for.
            micro_batch: as for the loss of the other images.
        """
        labels = [_asked_labels(aim.attribute, asked).to(images.device) for aim in self.aims]

        def terms(x: Tensor) -> tuple[Tensor, Tensor]:
            return self._keep_terms(images[x], originals[x], [label[x] for label in labels])

        parts = torch.arange(len(images), device=images.device).split(micro_batch or len(images))
        if len(parts) == 1:
            found = [terms(parts[0])]
        else:
            found = [checkpoint(terms, x, use_reentrant=False) for x in parts]
        total, obeyed = (torch.cat(x) for x in zip(*found, strict=True))  # (n,)
        whole, every = (torch.cat(distributed.gather(x)) for x in (total, obeyed))
        figures = {"keep/loss": whole.mean().item()}
        if every.isfinite().any():
            figures["keep/obeyed"] = every.nanmean().item()
        return total.mean() * (len(total) / len(whole)), figures

    def _keep_terms(
        self, images: Tensor, originals: Originals, labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each image's loss (n,), and whether it shows what is asked for (n,), NaN if nothing is.

        Labels are the class numbers asked for, (n,) for each attribute, -1 where none is.
        """
        faces = self.judges.faces(images.detach())
        nothing = faces.found.new_zeros(len(images), len(self.aims))
        loss = self._semantics(images, faces, originals, nothing)
        obeyed = images.new_full((len(images),), torch.inf)
        every = zip(self.aims, self._perceived(images, faces), labels, strict=True)
        for aim, p, label in every:
            whole = not aim.attribute.of_faces
            rows = label if whole else label[faces.owner[faces.found]]  # of each row of p
            target = rows.clamp(min=0)
            sure = (rows >= 0).to(p)
            cross_entropy = alignment_loss(p, _certain(target, sure, p.shape[1]), 0.5)
            right = (p.argmax(1) == target).to(p)
            loss = loss + (cross_entropy if whole else _means(cross_entropy, faces))
            right = right if whole else _means(right, faces)
            obeyed = torch.where(label >= 0, obeyed.minimum(right.detach()), obeyed)
        return loss, obeyed.masked_fill(obeyed.isinf(), torch.nan)

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
        split = images.split(micro_batch or len(images))
        faces = Faces.joined([self.judges.faces(part) for part in split])
        own = self._perceived(images, faces, micro_batch)
        parts = [distributed.gather(x) for x in own]
        p = [torch.cat(x) for x in parts]  # of all processes
        counts = torch.cat(distributed.gather(faces.counts))  # of faces in each image of all
        targets = []
        for target, x, mine in zip(self._targets(p, counts, prompts), parts, own, strict=True):
            before = sum(len(rows) for rows in x[: distributed.rank()])
            rows = torch.arange(len(mine), device=images.device) + before
            targets.append(_some(target, rows))
        of_faces = [aim.attribute.of_faces for aim in self.aims]
        figures = self._figures(p, counts, len(prompts)) | self._wanted(counts, prompts)
        return Sought(faces, targets, of_faces, figures)

    def _terms(self, images: Tensor, originals: Originals, sought: Sought) -> dict[str, Tensor]:
        """Name -> each image's term of the loss (n,), with its weight."""
        faces = sought.faces
        before, known = _before(faces, originals.faces)  # (m,)
        alignment, differs = self._align(images, faces, originals, before, known, sought.targets)
        terms = {
            "alignment": alignment,
            "semantics": self._semantics(images, faces, originals, differs),
        }
        if self.real_faces is not None:
            stays = ~differs[:, sought.of_faces].any(1)  # (n,)
            kept = originals.sure[before] & stays[faces.owner[faces.found]]  # (m,)
            terms["face"] = self._realism(self.real_faces, images, faces, originals, before, kept)
        return terms

    def _figures(self, p: Sequence[Tensor], faces: Tensor, prompts: int) -> dict[str, float]:
        """Of the probabilities for each attribute, and of the number of faces in each image (n,).

        'faces' is the share of images with a face. Of faces, or of whole images, prompt by prompt,
        'bias/NAME' is the mean over the prompts with any, 'largest/NAME' the share of the class
        that most of all prompts are of, 'share/NAME/CLASS' that of each class.
        """
        figures = {}
        if any(aim.attribute.of_faces for aim in self.aims):
            figures["faces"] = (faces > 0).float().mean().item()
        for aim, x in zip(self.aims, p, strict=True):
            name = aim.attribute.name
            sizes = _sizes(aim.attribute, faces, prompts)
            parts = [part.argmax(1) for part in x.split(sizes) if len(part)]
            counts = [torch.bincount(y, minlength=x.shape[1]).numpy(force=True) for y in parts]
            if counts:
                figures[f"bias/{name}"] = float(np.mean([bias(frequencies(n)) for n in counts]))
                shares = frequencies(np.sum(counts, axis=0))  # (classes,)
                figures[f"largest/{name}"] = float(shares.max())
                for c, share in zip(aim.attribute.classes, shares, strict=True):
                    figures[f"share/{name}/{c}"] = float(share)
        return figures

    def _wanted(self, faces: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """'target/NAME/CLASS', the mean target of what counts; where prompts have their own."""
        figures = {}
        for a in (aim.attribute for aim in self.aims if aim.attribute.targets):
            sizes = _sizes(a, faces, len(prompts))
            if sum(sizes):
                own = [a.target_of(prompt) for prompt in prompts]
                mean = np.average(own, axis=0, weights=sizes)  # (classes,)
                for c, share in zip(a.classes, mean, strict=True):
                    figures[f"target/{a.name}/{c}"] = float(share)
        return figures

    def _align(
        self,
        images: Tensor,
        faces: Faces,
        originals: Originals,
        before: Tensor,
        known: Tensor,
        targets: Sequence[Targets],
    ) -> tuple[Tensor, Tensor]:
        """The alignment loss (n,), and which classes are to change, (n, attributes) bool.

        An image with several faces has the mean of their losses, and its class is to change where
        that of any of them is. One without a face has none, and is taken to change, as is a face
        that the original does not have.

        Args:
            images: (n, 3, h, w).
            faces: of these images.
            originals: of these images.
            before: (m,) row of each face found among those of the originals.
            known: (m,) whether it was there.
            targets: of each attribute.
        """
        first = torch.searchsorted(originals.faces.owner, torch.arange(len(images)).to(before))
        losses, differs = [], []
        every = zip(self.aims, self._perceived(images, faces), targets, strict=True)
        for aim, p, target in every:
            loss = alignment_loss(p, target, aim.threshold)  # of faces, or of images
            classes = originals.classes[aim.attribute.name]
            if aim.attribute.of_faces:
                same = (target.labels == classes[before]) & known
                losses.append(_means(loss, faces))
                differs.append((_means((~same).float(), faces) > 0) | (faces.counts == 0))
            else:
                losses.append(loss)
                differs.append(target.labels != classes[first])
        return torch.stack(losses).sum(0), torch.stack(differs, 1)

    def _targets(self, p: Sequence[Tensor], faces: Tensor, prompts: Sequence[str]) -> list[Targets]:
        """Of each attribute, its targets: those of each prompt's images among themselves.

        Args:
            p: for each attribute the probabilities of faces, or of whole images.
            faces: (n,) number of faces in each image.
            prompts: of the images.
        """
        cost = [aim.cost for aim in self.aims]
        whole = [not aim.attribute.of_faces for aim in self.aims]
        sizes = [_sizes(aim.attribute, faces, len(prompts)) for aim in self.aims]
        parts = zip(*(x.split(size) for x, size in zip(p, sizes, strict=True)), strict=True)
        counts = faces.chunk(len(prompts))
        of_prompts = [
            region_targets(part, self._target_of(prompt), count, whole, cost_weights=cost)
            for prompt, part, count in zip(prompts, parts, counts, strict=True)
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
        face those of faces are taken to. An attribute of the whole image leaves the face as it is.
        """
        changed = _smallest([aim.semantics_changed for aim in self.aims], differs)  # (n,)
        inner = [aim.semantics_face if aim.attribute.of_faces else 1.0 for aim in self.aims]
        face = _smallest(inner, differs)[:, None, None]
        inside = _face_area(faces, images) & _face_area(originals.faces, images)  # (n, h, w)
        images = scale_gradient(images, torch.where(inside, face, 1.0)[:, None])
        pairs = zip(self._features(images), originals.features, strict=True)
        loss = sum(semantics_loss(x, o) for x, o in pairs)  # equation 7
        return self.weights.semantics * changed * loss

    def _realism(
        self,
        real: RealFaces,
        images: Tensor,
        faces: Faces,
        originals: Originals,
        before: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """The weighted face realism loss (n,), of several faces the mean; 0 without a face."""
        assert originals.embeddings is not None
        if not faces.found.any():
            return images.new_zeros(len(images))
        shown, there = images[faces.owner[faces.found]], faces[faces.found]
        own = originals.embeddings[before]  # (m, d)
        loss = face_realism_loss(real.embed(shown, there), real.bank, own, kept)  # (m,)
        return self.weights.face * _means(loss, faces)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.judges.clip(images), self.judges.dino(images)


def _asked_labels(attribute: Attribute, asked: Sequence[Mapping[str, str]]) -> Tensor:
    """(n,) number of the class that each image's prompt asks for; -1 where it asks for none."""
    names = [classes.get(attribute.name) for classes in asked]
    return torch.tensor([-1 if name is None else attribute.classes.index(name) for name in names])


def _certain(labels: Tensor, sure: Tensor, classes: int) -> Targets:
    """Targets of one class each, (n,), as sure as is said (n,)."""
    return Targets(labels, sure, functional.one_hot(labels, classes).to(sure), 0.0)


def _smallest(factors: Sequence[float], differs: Tensor) -> Tensor:
    """(n,): of the attributes that differ (n, attributes), the smallest factor; 1 if none does."""
    return torch.where(differs, torch.tensor(factors, device=differs.device), 1.0).amin(1)


def _face_area(faces: Faces, images: Tensor) -> Tensor:
    """(n, h, w) bool: inside a face of the image."""
    h, w = images.shape[-2:]
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:]  # (rows, 2)
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (w, h))
    columns = (x >= low[:, :1]) & (x <= high[:, :1])  # (rows, w)
    rows = (y >= low[:, 1:]) & (y <= high[:, 1:])  # (rows, h)
    inside = rows[:, :, None] & columns[:, None, :] & faces.found[:, None, None]  # (rows, h, w)
    if faces.image is None:
        return inside
    return inside.new_zeros(len(images), h, w).index_put((faces.image,), inside, accumulate=True)


def _before(faces: Faces, originals: Faces) -> tuple[Tensor, Tensor]:
    """What each face found was in the original: a row (m,) of its faces, and whether it was any.

    Of the largest faces any two of an image are the same one; of all, those that overlap most.
    """
    boxes, owner = faces.boxes[faces.found], faces.owner[faces.found]
    shared = overlap(boxes[:, None], originals.boxes)  # (m, rows)
    shared, rows = torch.where(owner[:, None] == originals.owner, shared, -1.0).max(1)
    same = originals.found[rows]
    return rows, same if originals.image is None else same & (shared > 0)


def _means(values: Tensor, faces: Faces) -> Tensor:
    """Means (n,) over the faces of each image, of values (m,) of the faces found; 0 without one."""
    owner, counts = faces.owner[faces.found], faces.counts
    return values.new_zeros(len(counts)).index_add(0, owner, values / counts[owner])


def _sizes(attribute: Attribute, faces: Tensor, prompts: int) -> list[int]:
    """What counts of each prompt: its faces, of `faces` (n,) in each image, or its images."""
    parts = faces.chunk(prompts)
    return [int(part.sum()) if attribute.of_faces else len(part) for part in parts]


def _some(target: Targets, rows: Tensor) -> Targets:
    """Some rows of the targets."""
    return replace(
        target,
        labels=target.labels[rows],
        confidence=target.confidence[rows],
        plan=target.plan[rows],
    )


def _joined(parts: Sequence[Originals]) -> Originals:
    """One after the other."""
    faces = [part.embeddings for part in parts if part.embeddings is not None]
    clip, dino = (torch.cat(list(x)) for x in zip(*(part.features for part in parts), strict=True))
    return Originals(
        Faces.joined([part.faces for part in parts]),
        {name: torch.cat([part.classes[name] for part in parts]) for name in parts[0].classes},
        (clip, dino),
        torch.cat([part.sure for part in parts]),
        torch.cat(faces) if faces else None,
    )
