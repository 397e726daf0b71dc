"""Zero-shot classifiers, which compare images with phrases for each class."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from diffusers_fair.backends import open_clip
from diffusers_fair.backends.needs import Need
from diffusers_fair.backends.open_clip import OpenClipEncoder
from diffusers_fair.vision.classifiers import NetworkClassifier


def zero_shot(encoder: OpenClipEncoder, phrases: Mapping[str, Sequence[str]]) -> NetworkClassifier:
    """Make a zero-shot classifier from an image-text encoder (Radford et al., 2021, section 3.1).

    Args:
        encoder: encoder of face crops, or whole images, and phrases.
        phrases: class -> phrases for it; the class is represented by the mean of their features.
    """
    means = [encoder.texts(list(texts)).mean(0) for texts in phrases.values()]
    anchors = F.normalize(torch.stack(means), dim=-1)  # (classes, d)
    scale = encoder.model.logit_scale.exp()
    return NetworkClassifier(
        lambda chips: scale * encoder(chips) @ anchors.T, tuple(phrases), encoder.pixels.size
    )


def load(
    model: str,
    phrases: Mapping[str, Sequence[str]],
    load_clip: Callable[[str], OpenClipEncoder],
) -> NetworkClassifier:
    """Load an encoder, and make a zero-shot classifier from it.

    Args:
        model: an open_clip model, as in `open_clip.load`.
        phrases: class -> phrases for it.
        load_clip: loads the encoder of that name, each only once.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: the model does not exist, or cannot be reached.
    """
    return zero_shot(load_clip(f"open_clip:{model}"), phrases)


def needs(model: str) -> list[Need]:
    """List the requirements of `load`."""
    return open_clip.needs(model)
