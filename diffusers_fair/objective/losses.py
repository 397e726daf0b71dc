"""Losses of generated images: one term per image, the loss of a batch is their mean. Pure."""

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_fair.objective.targets import Targets


def alignment_loss(probabilities: Tensor, targets: Targets, threshold: float) -> Tensor:
    """Compute each image's term of the distributional alignment loss of an attribute (equation 6).

        1[c_i >= C] CE(p_i, y_i)

    Targets with a confidence below C are ignored.

    Args:
        probabilities: (n, classes), p_i, of a classifier.
        targets: y_i and c_i for the same images.
        threshold: C, in [0, 1].

    Returns:
        (n,), nats. Equation 6 is the mean over the batch; over several processes it is the sum
        divided by the number of images of all of them.

    Raises:
        ValueError: targets of another number of images or classes.
    """
    if probabilities.shape != targets.plan.shape:
        raise ValueError(
            f"expected probabilities of {tuple(targets.plan.shape)} images and classes as the "
            f"targets have, got {tuple(probabilities.shape)}"
        )
    smallest = torch.finfo(probabilities.dtype).tiny  # a probability of 0 gets no gradient, not NaN
    log_p = probabilities.clamp_min(smallest).log()
    cross_entropy = functional.nll_loss(log_p, targets.labels.to(log_p.device), reduction="none")
    is_certain = (targets.confidence >= threshold).to(log_p.device)
    return torch.where(is_certain, cross_entropy, 0)


def semantics_loss(features: Tensor, original: Tensor) -> Tensor:
    """Compute the dissimilarity of images to their originals by one encoder, a term of equation 7.

        1 - cos(encoder(x_i), encoder(o_i))

    Args:
        features: (n, d), of the generated images.
        original: (n, d), of the original model's images for the same prompts and noise.

    Returns:
        (n,), in [0, 2].

    Raises:
        ValueError: the shapes differ.
    """
    if features.shape != original.shape:
        raise ValueError(
            f"expected features of the same images and encoder, got shapes "
            f"{tuple(features.shape)} and {tuple(original.shape)}"
        )
    return 1 - functional.cosine_similarity(features, original, dim=-1)


def face_realism_loss(
    embeddings: Tensor, reference: Tensor, original: Tensor, is_kept: Tensor
) -> Tensor:
    """Compute the dissimilarity of generated faces to the nearest real ones (equation 8).

        1 - max_F cos(emb(face_i), emb(F))

    The paper prints a minimum over F, but its text says the closest face, whose cosine is the
    largest. As in the authors' code, a face that should keep its classes is compared with the
    face in the original image instead.

    Args:
        embeddings: (n, d), of the generated faces, of unit length.
        reference: (m, d), of the real faces F, of unit length.
        original: (n, d), of the faces in the original images, of unit length; used where `is_kept`.
        is_kept: (n,) bool, whether a face is compared with the one in the original image.

    Returns:
        (n,), in [0, 2].

    Raises:
        ValueError: no reference faces, or embeddings of different sizes.
    """
    if not len(reference) or reference.shape[1:] != embeddings.shape[1:]:
        raise ValueError(
            f"expected one or more reference faces with embeddings of size {embeddings.shape[1]}, "
            f"as for the generated faces, got shape {tuple(reference.shape)}"
        )
    if original.shape != embeddings.shape:
        raise ValueError(
            f"expected the original faces of the same images by the same embedder, got shapes "
            f"{tuple(embeddings.shape)} and {tuple(original.shape)}"
        )
    nearest = (embeddings @ reference.T).amax(1)  # (n,)
    return 1 - torch.where(is_kept, (embeddings * original).sum(1), nearest)


def scale_gradient(images: Tensor, factor: Tensor) -> Tensor:
    """Return the images unchanged; the backward pass multiplies their gradient by `factor`.

    Args:
        images: (n, c, h, w).
        factor: broadcasts to the same shape.
    """
    return images.detach() + factor * (images - images.detach())
