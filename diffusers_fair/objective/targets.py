"""Class probabilities -> a target class for each image: expected optimal transport. Pure.

For images with class probabilities p_1..p_n and n targets u_1..u_n sampled from the distribution D,
the transport sigma* moves the probabilities least (equation 4); the target class of an image is the
most probable one over all samples (equation 5):

    sigma* = argmin_sigma sum_i |p_i - u_sigma(i)|,   q_i = E u_sigma*(i),
    y_i = argmax q_i,   c_i = max q_i

Only the number of targets of each class matters, which is multinomial. Several attributes are
transported together, as one attribute whose classes are the combinations of theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

_MASS = 0.999  # probability mass of the multinomial that an enumeration covers
_ENUMERATED = 20_000  # largest number of count vectors that are enumerated
_SAMPLES = (
    512  # count vectors to sample if there are more; 2 % of labels differ from 16,384 samples'
)


@dataclass(frozen=True)
class Targets:
    """Target classes of n images that make the batch follow the target distribution.

    They are computed in float64, which not every device has, so they stay on the CPU.
    """

    labels: Tensor
    """(n,), y_i, long."""
    confidence: Tensor
    """(n,), c_i, in [0, 1]."""
    plan: Tensor
    """(n, classes), q_i; rows sum to 1."""
    error: float
    """Error of an entry of the plan. Two classes: 0. Enumerated: a bound, the probability mass of
    the multinomial left out. Sampled: the largest standard error of an entry."""

    def __getitem__(self, rows: Tensor) -> "Targets":
        """Select rows by their indices."""
        rows = rows.to(self.labels.device)
        return Targets(self.labels[rows], self.confidence[rows], self.plan[rows], self.error)


def expected_targets(
    probabilities: Tensor,
    target: Sequence[float] | Tensor,
    *,
    mass: float = _MASS,
    samples: int = _SAMPLES,
    generator: torch.Generator | None = None,
) -> Targets:
    """Find the target class of each image, for one attribute.

    Ties between images of the same probabilities are broken by their order, so they get different
    targets; equal input gives equal targets in every process.

    Args:
        probabilities: (n, classes), p_i; no gradient flows through targets.
        target: (classes,), D.
        mass: probability mass of the multinomial to enumerate, for more than two classes.
        samples: number of samples if there are too many count vectors to enumerate.
        generator: CPU generator for these samples; default: one with seed 0.

    Raises:
        ValueError: shapes that do not fit, a target that is no distribution, or probabilities that
            are not finite.
    """
    share = torch.as_tensor(target, dtype=torch.float64)
    (targets,) = _joint_targets(
        [probabilities], share, mass=mass, samples=samples, generator=generator
    )
    return targets


def _joint_targets(
    probabilities: Sequence[Tensor],
    target: Sequence[Sequence[float] | Tensor] | Tensor,
    *,
    cost_weights: Sequence[float] | None = None,
    mass: float = _MASS,
    samples: int = _SAMPLES,
    generator: torch.Generator | None = None,
) -> list[Targets]:
    """Find the target classes of each image, for several attributes together.

    Args:
        probabilities: for each attribute (n, classes of the attribute).
        target: either a distribution for each attribute, taken as independent, so that each is
            also aligned within the classes of the others; or one tensor (classes, classes, ...) of
            joint shares.
        cost_weights: w_a, weight of each attribute in the cost of moving an image,
            cost^2 = sum_a w_a |p_a - u_a|^2; default: 1.
        mass: as in `expected_targets`.
        samples: as in `expected_targets`.
        generator: as in `expected_targets`.

    Returns:
        Targets of each attribute, from the joint plan summed over the other attributes' classes.

    Raises:
        ValueError: as in `expected_targets`.
    """
    sizes = [p.shape[-1] for p in probabilities]
    share = _joint_share(target, sizes)  # (classes, classes, ...)
    _require_probabilities(probabilities)
    weights = [1.0] * len(sizes) if cost_weights is None else cost_weights
    if len(weights) != len(sizes):
        raise ValueError(f"expected {len(sizes)} cost weights, got {len(weights)}")
    cost = _cost(probabilities, weights)  # (n, classes of all)
    plan, error = _expected_plan(cost, share.flatten(), mass, samples, generator)
    joint = plan.view(len(plan), *sizes)
    return [_targets(_marginal(joint, a), error) for a in range(len(sizes))]


def region_targets(
    probabilities: Sequence[Tensor],
    target: Sequence[Sequence[float] | Tensor],
    faces: Tensor,
    whole: Sequence[bool],
    *,
    cost_weights: Sequence[float] | None = None,
) -> list[Targets]:
    """Find the target classes for attributes of faces and of whole images together.

    Faces are transported jointly for all attributes, with the probabilities of the whole image for
    attributes of whole images. These are thus also aligned within the classes of the faces. The
    plan of an image with several faces is their mean. Images without a face are transported among
    themselves, with the same target. If no attribute is one of faces, faces are ignored.

    Args:
        probabilities: for each attribute of faces (m, classes), ordered by image; for each
            attribute of whole images (n, classes).
        target: a distribution for each attribute.
        faces: (n,) number of faces in each image.
        whole: for each attribute, whether it is one of whole images.
        cost_weights: as in `_joint_targets`.

    Returns:
        Targets of each attribute, one row for each row of its probabilities.

    Raises:
        ValueError: as in `expected_targets`.
    """
    weights = [1.0] * len(whole) if cost_weights is None else cost_weights
    probabilities = [p.detach().cpu() for p in probabilities]
    faces = torch.zeros(len(faces), dtype=torch.long) if all(whole) else faces.cpu()
    owner = torch.arange(len(faces)).repeat_interleave(faces)  # image of each face
    alone, kept = faces == 0, [a for a, w in enumerate(whole) if w]
    shown = [p[owner] if w else p for p, w in zip(probabilities, whole, strict=True)]
    results = _some_targets(shown, target, weights)
    faceless = _some_targets(
        [probabilities[a][alone] for a in kept],
        [target[a] for a in kept],
        [weights[a] for a in kept],
    )
    for a, other in zip(kept, faceless, strict=True):
        plan = other.plan.new_zeros(len(faces), other.plan.shape[1])
        plan.index_add_(0, owner, results[a].plan / faces[owner][:, None])
        plan[alone] = other.plan
        results[a] = _targets(plan, max(results[a].error, other.error))
    return results


def _some_targets(
    probabilities: Sequence[Tensor],
    target: Sequence[Sequence[float] | Tensor],
    weights: Sequence[float],
) -> list[Targets]:
    """Call `_joint_targets`, or return empty targets if there is no image."""
    if probabilities and len(probabilities[0]):
        return _joint_targets(probabilities, target, cost_weights=weights)
    return [_targets(p.double(), 0.0) for p in probabilities]


def joined(parts: Sequence[Targets]) -> Targets:
    """Concatenate targets of several batches; the error is the largest of theirs."""
    return Targets(
        torch.cat([part.labels for part in parts]),
        torch.cat([part.confidence for part in parts]),
        torch.cat([part.plan for part in parts]),
        max(part.error for part in parts),
    )


def _targets(plan: Tensor, error: float) -> Targets:
    """Read y_i and c_i off the plan (equation 6)."""
    confidence, labels = plan.max(dim=1)
    return Targets(labels, confidence, plan, error)


def _marginal(joint: Tensor, attribute: int) -> Tensor:
    """Sum a plan (n, classes, classes, ...) over all attributes but one, to (n, classes)."""
    return joint.movedim(attribute + 1, 1).flatten(2).sum(2) if joint.ndim > 2 else joint


def _joint_share(target: Sequence[Sequence[float] | Tensor] | Tensor, sizes: list[int]) -> Tensor:
    """Return the joint target distribution, (classes, classes, ...) float64."""
    if isinstance(target, Tensor):
        share = target.cpu().double()
    else:
        share = torch.ones((), dtype=torch.float64)
        for part in target:
            share = share[..., None] * torch.as_tensor(part, dtype=torch.float64)
    if list(share.shape) != sizes:
        raise ValueError(
            f"the target must have one share for each class, shape {sizes}, got {list(share.shape)}"
        )
    if not (share >= 0).all() or abs(share.sum().item() - 1) > 1e-6:
        raise ValueError(
            "the target must be a distribution: shares of 0 or more that sum to 1, got "
            f"{share.tolist()}"
        )
    return share / share.sum()


def _require_probabilities(probabilities: Sequence[Tensor]) -> None:
    """Raise an error for probabilities that cannot be transported."""
    shapes = [tuple(p.shape) for p in probabilities]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"probabilities must be (images, classes), of the same images, got {shapes}"
        )
    if not all(p.isfinite().all() for p in probabilities):
        raise ValueError("probabilities must be finite, got NaN or infinity: check the classifier")


def _cost(probabilities: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return |p_i - u_k| for every image and combination of classes. (n, classes of all)."""
    squared = torch.zeros(len(probabilities[0]), 1, dtype=torch.float64)
    for p, weight in zip(probabilities, weights, strict=True):
        p = p.detach().cpu().double()
        one_hot = torch.eye(p.shape[1], dtype=torch.float64)
        distance = (p[:, None] - one_hot).square().sum(2)  # (n, classes)
        squared = (squared[:, :, None] + weight * distance[:, None]).flatten(1)
    return squared.sqrt()


def _expected_plan(
    cost: Tensor, share: Tensor, mass: float, samples: int, generator: torch.Generator | None
) -> tuple[Tensor, float]:
    """Return E u_sigma* (n, classes) and its error (equation 5)."""
    count, classes = cost.shape
    if classes == 2:
        return _two_class_plan(cost, share), 0.0
    possible = math.comb(count + classes - 1, classes - 1)
    if possible <= _ENUMERATED:
        counts, weights = _most_probable_counts(count, share, mass)
        missing = max(0.0, 1 - weights.sum().item())
        return _average_plan(cost, counts, weights / weights.sum()), missing
    counts, weights = _sampled_counts(count, share, samples, generator)
    plan = _average_plan(cost, counts, weights)
    return plan, (plan * (1 - plan) / samples).max().sqrt().item()


def _two_class_plan(cost: Tensor, share: Tensor) -> Tensor:
    """Return the expected plan of two classes: sort, and class 0 goes to the first k ~ binomial."""
    count = len(cost)
    order = (cost[:, 0] - cost[:, 1]).argsort(stable=True)  # cheapest for class 0 first
    k = torch.arange(count + 1)
    weights = _multinomial(torch.stack([k, count - k], dim=1), share)  # (n + 1,), P(k)
    first = torch.empty(count, dtype=torch.float64)
    first[order] = weights.flip(0).cumsum(0).flip(0)[1:]  # P(k > rank)
    return torch.stack([first, 1 - first], dim=1).clamp(0, 1)


def _most_probable_counts(count: int, share: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Return the most probable count vectors (m, classes) that cover `mass`, and their weights."""
    classes = len(share)
    bars = torch.tensor(list(combinations(range(count + classes - 1), classes - 1)))
    walls = torch.cat(
        [torch.full((len(bars), 1), -1), bars, torch.full((len(bars), 1), count + classes - 1)], 1
    )
    counts = walls.diff(dim=1) - 1  # (m, classes), stars between bars
    weights, order = _multinomial(counts, share).sort(descending=True, stable=True)
    kept = int((weights.cumsum(0) < mass).sum()) + 1
    return counts[order[:kept]], weights[:kept]


def _sampled_counts(
    count: int, share: Tensor, samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Sample count vectors (m, classes), each with its relative frequency."""
    generator = generator or torch.Generator().manual_seed(0)
    labels = torch.multinomial(share, samples * count, replacement=True, generator=generator)
    counts = torch.nn.functional.one_hot(labels.view(samples, count), len(share)).sum(1)
    counts, times = counts.unique(dim=0, return_counts=True)
    return counts, times.double() / samples


def _multinomial(counts: Tensor, share: Tensor) -> Tensor:
    """Return the probability of each count vector (m, classes) under the shares. (m,)."""
    counts = counts.double()
    ways = torch.lgamma(counts.sum(1) + 1) - torch.lgamma(counts + 1).sum(1)
    return (ways + torch.xlogy(counts, share).sum(1)).exp()


def _average_plan(cost: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """Average the optimal assignments over many count vectors. (n, classes)."""
    plan = np.zeros(cost.shape)
    images, costs = np.arange(len(cost)), cost.numpy()
    for class_counts, probability in zip(counts.numpy(), weights.tolist(), strict=True):
        plan[images, _assign(costs, class_counts)] += probability
    return torch.from_numpy(plan)


def _assign(cost: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Assign classes to images at the least cost, given the number of images per class. (n,)."""
    from scipy.optimize import linear_sum_assignment

    classes = np.repeat(np.arange(len(class_counts)), class_counts)  # (n,), u_1..u_n
    return classes[linear_sum_assignment(cost[:, classes])[1]]
