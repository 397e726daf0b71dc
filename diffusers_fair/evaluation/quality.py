"""Image quality: similarity to the prompt and to the base model's image.

CLIP-T is the cosine similarity of an image and its prompt. CLIP-I and DINO are the cosine
similarities of an image and the base model's image of the same prompt and noise (section 5.1). All
are in [-1, 1]; 1 means identical.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.vision.encoders import ImageEncoder, ImageTextEncoder

Features = Mapping[str, np.ndarray]
"""Encoder ("clip", "dino") -> unit-length features (n, d), float32."""


@torch.no_grad()
def image_features(images: Tensor, clip: ImageEncoder, dino: ImageEncoder) -> dict[str, np.ndarray]:
    """Encode images (n, 3, h, w) in [-1, 1] for `quality_scores`.

    Raises:
        ValueError: features are not finite.
    """
    features = {"clip": _array(clip(images)), "dino": _array(dino(images))}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"the {name} encoder returned non-finite features: check its weights and "
                "precision, and the pipeline's"
            )
    return features


@torch.no_grad()
def prompt_features(prompts: Sequence[str], clip: ImageTextEncoder) -> np.ndarray:
    """Encode prompts with CLIP, 64 at a time: unit-length features (P, d)."""
    parts = [list(prompts[i : i + 64]) for i in range(0, len(prompts), 64)]
    return np.concatenate([_array(clip.texts(part)) for part in parts])


def quality_scores(
    features: Features, texts: np.ndarray, reference: Features | None = None
) -> dict[str, np.ndarray]:
    """Compute CLIP-T of images and, with a reference, CLIP-I and DINO.

    Args:
        features: features of n images.
        texts: CLIP features of their prompts (n, d).
        reference: features of the base model's images of the same prompts and noise.

    Returns:
        "clip_t", and with a reference "clip_i" and "dino": cosines (n,).
    """
    scores = {"clip_t": _cosine(features["clip"], texts)}
    if reference is not None:
        scores["clip_i"] = _cosine(features["clip"], reference["clip"])
        scores["dino"] = _cosine(features["dino"], reference["dino"])
    return scores


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine similarity of unit-length rows (n, d)."""
    return np.einsum("nd,nd->n", x, y)
