"""Image classification models of transformers, whose labels are mapped to classes."""

from collections.abc import Mapping, Sequence

import torch

from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.labels import group, merge
from diffusers_fair.backends.needs import Need, pretrained
from diffusers_fair.backends.processor import load_pixels
from diffusers_fair.vision.classifiers import NetworkClassifier


def load(
    model: str, classes: Mapping[str, Sequence[str]], device: torch.device | str = "cpu"
) -> NetworkClassifier:
    """Load an image classification model.

    Args:
        model: Hub id or folder.
        classes: class -> labels of the model; empty if the labels are the classes.
        device: device that it computes on, in float32.

    Raises:
        ValueError: the model does not exist, cannot be reached, or has other labels.
    """
    from transformers import AutoModelForImageClassification

    with loading(f"the classifier '{model}'", "an image classification model with these labels"):
        network = AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32)
        pixels = load_pixels(model)
        labels = [network.config.id2label[i] for i in range(network.config.num_labels)]
        groups = group(labels, classes)
    network = network.to(device).eval().requires_grad_(False)
    return NetworkClassifier(
        merge(lambda chips: network(pixels(chips)).logits, groups), tuple(groups), pixels.size
    )


def needs(model: str) -> list[Need]:
    """List the requirements of `load`."""
    return [pretrained(model)]
