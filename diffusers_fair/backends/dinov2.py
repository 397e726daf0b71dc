"""DINOv2 image encoder of transformers."""

from typing import Any

import torch

from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, pretrained
from diffusers_fair.backends.processor import load_pixels
from diffusers_fair.vision.encoders import DinoEncoder


def load(model: str, device: torch.device | str = "cpu") -> DinoEncoder:
    """Load a DINOv2 model.

    Args:
        model: Hub id or folder.
        device: device that it computes on, in float32.

    Raises:
        ValueError: the model does not exist, cannot be reached, or is not a DINOv2.
    """
    from transformers import AutoConfig, Dinov2Model

    with loading(f"the DINOv2 '{model}'", "a Hub id or a folder"):
        config = AutoConfig.from_pretrained(model)
        if config.model_type != "dinov2":
            raise ValueError(f"it is of type '{config.model_type}'")
        pixels = load_pixels(model)
        network: Any = Dinov2Model.from_pretrained(model, dtype=torch.float32)
    return DinoEncoder(network.to(device).eval().requires_grad_(False), pixels)


def needs(model: str) -> list[Need]:
    """List the requirements of `load`."""
    return [pretrained(model)]
