"""Images and texts -> features of unit length whose cosine measures similarity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer, Dinov2Model


class ImageEncoder(Protocol):
    """Encodes what an image looks like."""

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, d) of length 1, differentiable."""


class ImageTextEncoder(ImageEncoder, Protocol):
    """Encodes images and texts into the same space."""

    def texts(self, texts: list[str]) -> Tensor:
        """Texts -> (n, d) of length 1."""


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images (n, 3, h, w) to squares (n, 3, size, size), differentiably."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


@dataclass(frozen=True)
class Pixels:
    """The image size and the colour normalisation that an encoder was trained with."""

    size: int
    """Side of its square input, in pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each channel in [0, 1]; the default keeps values in [-1, 1] as they are."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel."""

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, 3, size, size), normalised for the encoder."""
        images = resized(images, self.size)
        mean, std = (torch.tensor(v).to(images).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std


@dataclass(frozen=True)
class ClipEncoder:
    """An `ImageTextEncoder` made from a CLIP model of transformers."""

    model: "CLIPModel"
    tokenizer: "CLIPTokenizer"
    pixels: Pixels

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, d) of length 1."""
        states = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(self.model.visual_projection(states), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Texts, truncated to the tokenizer's length -> (n, d) of length 1."""
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.model.device)
        states = self.model.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.model.text_projection(states), dim=-1)


@dataclass(frozen=True)
class DinoEncoder:
    """An `ImageEncoder` made from a DINOv2 of transformers: its class token."""

    model: "Dinov2Model"
    pixels: Pixels

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, d) of length 1."""
        return F.normalize(self.model(self.pixels(images)).pooler_output, dim=-1)


@dataclass(frozen=True)
class NetworkEncoder:
    """An `ImageEncoder` made from any network with one vector per image."""

    network: Callable[[Tensor], Tensor]
    """(n, 3, size, size) -> (n, d)."""
    pixels: Pixels

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1] -> (n, d) of length 1."""
        return F.normalize(self.network(self.pixels(images)), dim=-1)
