"""Images -> the largest face of each -> square chips for classifiers. The detector is anyone's."""

from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Faces:
    """The largest face of each image; `found`, never a number, marks images without a face."""

    boxes: Tensor
    """(n, 4) corners x0, y0, x1, y1 in pixels; finite, but without meaning where not found."""
    found: Tensor
    """(n,) bool."""
    landmarks: Tensor | None = None
    """(n, 5, 2) pixels: eyes, nose, corners of the mouth; None if the detector gives none."""

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, rows: Tensor | slice) -> "Faces":
        """The same for some of the images: a mask, row numbers or a slice."""
        landmarks = None if self.landmarks is None else self.landmarks[rows]
        return Faces(self.boxes[rows], self.found[rows], landmarks)


class FaceDetector(Protocol):
    """Finds the largest face of every image."""

    def __call__(self, images: Tensor) -> Faces:
        """(n, 3, h, w) in [-1, 1] -> Faces, without gradient."""


def square_boxes(boxes: Tensor, margin: float) -> Tensor:
    """(n, 4) corners -> (n, 3) centre x, centre y and side of the square round each box, grown.

    Args:
        boxes: (n, 4) corners in pixels.
        margin: share of the longer side that is added in all, half on either side.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (high - low).amax(1, keepdim=True) * (1 + margin)  # (n, 1)
    return torch.cat([(low + high) / 2, side], 1)


def face_chips(images: Tensor, faces: Faces, size: int, margin: float = 0.5) -> Tensor:
    """Square crops round the faces; what lies outside the image repeats its border.

    Args:
        images: (n, 3, h, w).
        faces: of these images, one row each. Rows without a face give a chip too: leave them out
            before (`images[found]`, `faces[found]`) or after.
        size: side of the chips in pixels.
        margin: how much larger than the face's longer side the crop is.

    Returns:
        (n, 3, size, size), differentiable with respect to the images.

    Raises:
        ValueError: another number of faces than of images.
    """
    n, _, h, w = images.shape
    if len(faces) != n:
        raise ValueError(f"expected the faces of {n} images, one row each, got {len(faces)} rows")
    x, y, side = square_boxes(faces.boxes.to(images), margin).unbind(1)  # (n,) each
    fine = size * ceil(max(h, w) / size)  # each pixel of a chip averages a grid of samples
    steps = (torch.arange(fine).to(images) + 0.5) / fine - 0.5  # (fine,) in units of the side
    columns = 2 * (x[:, None] + side[:, None] * steps) / w - 1  # (n, fine) in [-1, 1] of the image
    rows = 2 * (y[:, None] + side[:, None] * steps) / h - 1
    grid = torch.stack(
        [columns[:, None, :].expand(-1, fine, -1), rows[:, :, None].expand(-1, -1, fine)], -1
    )  # (n, fine, fine, 2)
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, fine // size)
