"""Images -> the largest face of each, or every face -> chips for classifiers and embedders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE = (  # eyes, nose, corners of the mouth in an aligned chip: ArcFace's (Deng et al., 2019)
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
TEMPLATE_SIZE = 112  # pixels, of the chip that the template is for


@dataclass(frozen=True)
class Faces:
    """The largest face of each image, or all its faces; rows that are not `found` are no faces."""

    boxes: Tensor
    """(n, 4) corners x0, y0, x1, y1 in pixels; finite but meaningless where not found."""
    found: Tensor
    """(n,) bool."""
    landmarks: Tensor | None = None
    """(n, 5, 2) pixels: eyes, nose, corners of the mouth; None if the detector gives none."""
    image: Tensor | None = None
    """(n,) index of each row's image, ascending, the largest face of an image first; an image
    without a face has one row, which is not found. None: one row per image."""

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, rows: Tensor | slice) -> "Faces":
        """Select rows by a mask, indices or a slice."""
        landmarks = None if self.landmarks is None else self.landmarks[rows]
        image = None if self.image is None else self.image[rows]
        return Faces(self.boxes[rows], self.found[rows], landmarks, image)

    @property
    def owner(self) -> Tensor:
        """(n,) index of each row's image."""
        rows = torch.arange(len(self), device=self.found.device)
        return rows if self.image is None else self.image

    @property
    def counts(self) -> Tensor:
        """(images,) number of faces found in each image."""
        if self.image is None:
            return self.found.long()
        return torch.bincount(self.image, weights=self.found.double()).long()

    def mean_per_image(self, values: Tensor) -> Tensor:
        """Average values (m,) of the faces found over the faces of each image (n,); 0 without."""
        owner, counts = self.owner[self.found], self.counts
        return values.new_zeros(len(counts)).index_add(0, owner, values / counts[owner])

    def of_images(self, images: Tensor) -> tuple["Faces", Tensor]:
        """Select images by their indices (m,), which renumbers them; returns the rows, too."""
        if self.image is None:
            return self[images], images
        image, rows = (self.image == images[:, None]).nonzero(as_tuple=True)
        return replace(self[rows], image=image), rows

    @classmethod
    def joined(cls, parts: Sequence["Faces"]) -> "Faces":
        """Concatenate the faces of several batches of images."""
        marks = [part.landmarks for part in parts if part.landmarks is not None]
        image, images = [], 0
        for part in parts:
            if part.image is not None:
                image.append(part.image + images)
                images += int(part.image[-1]) + 1
        return cls(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.found for part in parts]),
            torch.cat(marks) if marks else None,
            torch.cat(image) if image else None,
        )


class FaceDetector(Protocol):
    """Finds the largest face of every image."""

    def __call__(self, images: Tensor) -> Faces:
        """(n, 3, h, w) in [-1, 1] -> Faces, without gradient."""


@runtime_checkable
class EveryFaceDetector(FaceDetector, Protocol):
    """Can find every face of every image, too."""

    def all_faces(self, images: Tensor) -> Faces:
        """(n, 3, h, w) in [-1, 1] -> Faces with `image`, without gradient."""


def faces_of_images(
    boxes: Tensor, image: Tensor, images: int, landmarks: Tensor | None = None
) -> Faces:
    """Make `Faces` with every face of some images from faces in any order.

    Args:
        boxes: (m, 4) corners in pixels.
        image: (m,) index of each face's image, in [0, images).
        images: number of images.
        landmarks: (m, 5, 2) pixels.
    """
    without = torch.ones(images, dtype=torch.bool, device=boxes.device)
    without[image] = False
    blank = without.nonzero().squeeze(1)  # images without a face
    boxes = torch.cat([boxes, boxes.new_zeros(len(blank), 4)])
    if landmarks is not None:
        landmarks = torch.cat([landmarks, landmarks.new_zeros(len(blank), 5, 2)])
    found = torch.arange(len(boxes), device=boxes.device) < len(image)
    image = torch.cat([image, blank])
    order = area(boxes).argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    return Faces(boxes, found, landmarks, image)[order]


def no_faces(images: Tensor) -> Faces:
    """Find no faces: a `FaceDetector` for attributes of whole images."""
    n = len(images)
    return Faces(images.new_zeros(n, 4), torch.zeros(n, dtype=torch.bool, device=images.device))


def match_faces(faces: Faces, originals: Faces) -> tuple[Tensor, Tensor]:
    """Find the original face of each face found.

    If only the largest faces count, those of an image and its original match. If all count, those
    that overlap most do.

    Args:
        faces: of some images.
        originals: of the original images.

    Returns:
        (m,) row of the original face, and (m,) bool, whether there is one.
    """
    boxes, owner = faces.boxes[faces.found], faces.owner[faces.found]
    overlaps = overlap(boxes[:, None], originals.boxes)  # (m, rows)
    overlaps, rows = torch.where(owner[:, None] == originals.owner, overlaps, -1.0).max(1)
    is_face = originals.found[rows]
    return rows, is_face if originals.image is None else is_face & (overlaps > 0)


def inside_faces(faces: Faces, images: Tensor) -> Tensor:
    """(n, h, w) bool: which pixels of images (n, c, h, w) are inside a face."""
    h, w = images.shape[-2:]
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:]  # (rows, 2)
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (w, h))
    columns = (x >= low[:, :1]) & (x <= high[:, :1])  # (rows, w)
    rows = (y >= low[:, 1:]) & (y <= high[:, 1:])  # (rows, h)
    inside = rows[:, :, None] & columns[:, None, :] & faces.found[:, None, None]  # (rows, h, w)
    if faces.image is None:
        return inside
    return inside.new_zeros(len(images), h, w).index_put((faces.image,), inside, accumulate=True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and (..., 4), in [0, 1]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (area(a) + area(b) - shared).clamp(min=1e-6)


def area(boxes: Tensor) -> Tensor:
    """Square pixels (...) of boxes (..., 4)."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def square_boxes(boxes: Tensor, margin: float) -> Tensor:
    """(n, 4) corners -> (n, 3) centre x, centre y and side of the square round each box, grown.

    Args:
        boxes: (n, 4) corners in pixels.
        margin: enlargement relative to the longer side, half of it on either side.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (high - low).amax(1, keepdim=True) * (1 + margin)  # (n, 1)
    return torch.cat([(low + high) / 2, side], 1)


def face_chips(images: Tensor, faces: Faces, size: int, margin: float = 0.5) -> Tensor:
    """Crop squares around the faces; the border is repeated outside the image.

    Args:
        images: (n, 3, h, w).
        faces: of these images, one row each. Rows without a face give a chip, too: leave them out
            before (`images[found]`, `faces[found]`) or after.
        size: side of the chips in pixels.
        margin: how much larger than the face's longer side the crop is.

    Returns:
        (n, 3, size, size), differentiable with respect to the images.

    Raises:
        ValueError: another number of faces than of images.
    """
    _check(images, faces)
    x, y, side = square_boxes(faces.boxes.to(images), margin).unbind(1)  # (n,) each
    steps = _steps(images, size) - 0.5  # (fine,) in units of the side, from the centre
    columns = x[:, None] + side[:, None] * steps  # (n, fine) pixels
    rows = y[:, None] + side[:, None] * steps
    fine = len(steps)
    points = torch.stack(
        [columns[:, None, :].expand(-1, fine, -1), rows[:, :, None].expand(-1, -1, fine)], -1
    )  # (n, fine, fine, 2)
    return _sample(images, points, size)


def aligned_chips(images: Tensor, faces: Faces, size: int) -> Tensor:
    """Crop faces with eyes, nose and mouth at the places that face embedders expect.

    Turn, scale and shift are those that bring the landmarks nearest to `TEMPLATE`, in the least
    squares (Umeyama, 1991), which are one complex division: a point x, y is the number x + iy, and
    a similarity z -> a z + b. What lies outside the image repeats its border.

    Args:
        images: (n, 3, h, w).
        faces: of these images, one row each, with landmarks. Rows without a face give a chip, too.
        size: side of the chips in pixels.

    Returns:
        (n, 3, size, size), differentiable with respect to the images.

    Raises:
        ValueError: another number of faces than of images, or no landmarks.
    """
    _check(images, faces)
    if faces.landmarks is None:
        raise ValueError("expected faces with landmarks, got none: cut them with face_chips")
    found = torch.view_as_complex(faces.landmarks.to(images).contiguous())  # (n, 5)
    wanted = torch.view_as_complex(torch.tensor(TEMPLATE).to(images)) * (size / TEMPLATE_SIZE)
    centre, middle = found.mean(1, keepdim=True), wanted.mean()
    spread = found - centre
    match = (spread.conj() * (wanted - middle)).sum(1)  # (n,), a times the square of the spread
    back = spread.abs().square().sum(1) * match.conj() / match.abs().square().clamp_min(1e-12)
    steps = _steps(images, size) * size  # (fine,) pixels of the chip
    chip = torch.complex(*torch.meshgrid(steps, steps, indexing="xy"))  # (fine, fine)
    points = centre[:, :, None] + back[:, None, None] * (chip - middle)  # 1 / a brings it back
    return _sample(images, torch.view_as_real(points), size)


def _check(images: Tensor, faces: Faces) -> None:
    n = len(images)
    if len(faces) != n:
        raise ValueError(f"expected the faces of {n} images, one row each, got {len(faces)} rows")


def _steps(images: Tensor, size: int) -> Tensor:
    """(fine,) places along a chip's side, in (0, 1): one or more for each of its pixels."""
    fine = size * ceil(max(images.shape[-2:]) / size)
    return (torch.arange(fine).to(images) + 0.5) / fine


def _sample(images: Tensor, points: Tensor, size: int) -> Tensor:
    """Chips (n, 3, size, size), whose pixels average samples at points (n, fine, fine, 2)."""
    h, w = images.shape[-2:]
    grid = 2 * points / points.new_tensor([w, h]) - 1  # in [-1, 1] of the image
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, points.shape[1] // size)
