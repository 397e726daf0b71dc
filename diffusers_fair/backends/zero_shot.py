"""Classes described in words -> a classifier that compares faces with the words."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from diffusers_fair.backends.open_clip import OpenClipEncoder
from diffusers_fair.vision.classifiers import NetworkClassifier


def zero_shot(encoder: OpenClipEncoder, phrases: Mapping[str, Sequence[str]]) -> NetworkClassifier:
    """Make a classifier out of an encoder of images and texts (Radford et al., 2021, section 3.1).

    Args:
        encoder: compares chips with phrases.
        phrases: class -> phrases for it; the mean of their features stands for the class.
    """
    means = [encoder.texts(list(texts)).mean(0) for texts in phrases.values()]
    anchors = F.normalize(torch.stack(means), dim=-1)  # (classes, d)
    scale = encoder.model.logit_scale.exp()
    return NetworkClassifier(
        lambda chips: scale * encoder(chips) @ anchors.T, tuple(phrases), encoder.pixels.size
    )
