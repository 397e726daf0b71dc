"""Conversion between images in [-1, 1], bytes and Pillow images."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def from_bytes(pixels: Tensor) -> Tensor:
    """Values in 0 to 255 -> float32 in [-1, 1]; the inverse of `to_bytes`."""
    return pixels.float() / 127.5 - 1


def to_arrays(images: Tensor) -> np.ndarray:
    """Images (..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8, as Pillow takes them."""
    return to_bytes(images).movedim(-3, -1).cpu().numpy()


def from_pillow(image: "Image") -> Tensor:
    """An RGB image -> (3, h, w) in [-1, 1]."""
    return from_bytes(torch.from_numpy(np.array(image)).permute(2, 0, 1))
