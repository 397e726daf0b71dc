"""Faces in images: detection results, matching, and crops (chips) for classifiers and embedders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE = (  # eyes, nose, corners of the mouth in an aligned chip (ArcFace, Deng et al., 2019)
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
_TEMPLATE_SIZE = 112  # side of the chip that the template is for, in pixels


@dataclass(frozen=True)
class Faces:
    """The largest face of each image, or all faces. Rows with `is_face` False are placeholders."""

    boxes: Tensor
    """(n, 4) corners x0, y0, x1, y1 in pixels; finite but meaningless in placeholders."""
    is_face: Tensor
    """(n,) bool, False for the placeholder of an image without a face."""
    landmarks: Tensor | None = None
    """(n, 5, 2) pixels: eyes, nose, corners of the mouth; None if the detector gives none."""
    image: Tensor | None = None
    """(n,) index of each row's image, ascending, the largest face of an image first; an image
    without a face has one row, a placeholder. None: one row per image."""

    def __len__(self) -> int:
        return len(self.is_face)

    def __getitem__(self, rows: Tensor | slice) -> "Faces":
        """Select rows by a mask, indices or a slice."""
        landmarks = None if self.landmarks is None else self.landmarks[rows]
        image = None if self.image is None else self.image[rows]
        return Faces(self.boxes[rows], self.is_face[rows], landmarks, image)

    @property
    def image_index(self) -> Tensor:
        """(n,) index of each row's image."""
        rows = torch.arange(len(self), device=self.is_face.device)
        return rows if self.image is None else self.image

    @property
    def counts(self) -> Tensor:
        """(images,) number of faces in each image."""
        if self.image is None:
            return self.is_face.long()
        images = int(self.image[-1]) + 1 if len(self.image) else 0
        return self.image.new_zeros(images).index_add(0, self.image, self.is_face.long())

    def mean_per_image(self, values: Tensor) -> Tensor:
        """Average values (m,) of all faces over the faces of each image (n,); 0 without a face."""
        image_index, counts = self.image_index[self.is_face], self.counts
        return values.new_zeros(len(counts)).index_add(0, image_index, values / counts[image_index])

    def of_images(self, images: Tensor) -> tuple["Faces", Tensor]:
        """Select and renumber images by their indices (m,); return the faces and their old rows."""
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
            torch.cat([part.is_face for part in parts]),
            torch.cat(marks) if marks else None,
            torch.cat(image) if image else None,
        )


class FaceDetector(Protocol):
    """Finds the largest face of every image."""

    def __call__(self, images: Tensor) -> Faces:
        """(n, 3, h, w) in [-1, 1] -> Faces, without gradient."""


@runtime_checkable
class EveryFaceDetector(FaceDetector, Protocol):
    """Finds the largest face, or every face, of every image."""

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
    is_blank = torch.ones(images, dtype=torch.bool, device=boxes.device)
    is_blank[image] = False
    blank = is_blank.nonzero().squeeze(1)  # images without a face
    boxes = torch.cat([boxes, boxes.new_zeros(len(blank), 4)])
    if landmarks is not None:
        landmarks = torch.cat([landmarks, landmarks.new_zeros(len(blank), 5, 2)])
    is_face = torch.arange(len(boxes), device=boxes.device) < len(image)
    image = torch.cat([image, blank])
    order = area(boxes).argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    return Faces(boxes, is_face, landmarks, image)[order]


def no_faces(images: Tensor) -> Faces:
    """Find no faces: a `FaceDetector` for attributes of whole images."""
    n = len(images)
    return Faces(images.new_zeros(n, 4), torch.zeros(n, dtype=torch.bool, device=images.device))


def match_faces(faces: Faces, originals: Faces) -> tuple[Tensor, Tensor]:
    """Find the original face that corresponds to each face.

    If only the largest faces count, those of an image and its original correspond. If all faces
    count, each corresponds to the original face that it overlaps most.

    Args:
        faces: faces of some images.
        originals: faces of the original images.

    Returns:
        (m,) row of the original face, and (m,) bool, whether it is a face.
    """
    boxes, image_index = faces.boxes[faces.is_face], faces.image_index[faces.is_face]
    overlaps = overlap(boxes[:, None], originals.boxes)  # (m, rows)
    is_same_image = image_index[:, None] == originals.image_index
    overlaps, rows = torch.where(is_same_image, overlaps, -1.0).max(1)
    is_face = originals.is_face[rows]
    return rows, is_face if originals.image is None else is_face & (overlaps > 0)


def inside_faces(faces: Faces, images: Tensor) -> Tensor:
    """Return a mask (n, h, w) of the pixels of images (n, c, h, w) that are inside a face."""
    h, w = images.shape[-2:]
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:]  # (rows, 2)
    x, y = (torch.arange(n, device=images.device) + 0.5 for n in (w, h))
    columns = (x >= low[:, :1]) & (x <= high[:, :1])  # (rows, w)
    rows = (y >= low[:, 1:]) & (y <= high[:, 1:])  # (rows, h)
    inside = rows[:, :, None] & columns[:, None, :] & faces.is_face[:, None, None]  # (rows, h, w)
    if faces.image is None:
        return inside
    return inside.new_zeros(len(images), h, w).index_put((faces.image,), inside, accumulate=True)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and (..., 4), in [0, 1]."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (area(a) + area(b) - shared).clamp(min=1e-6)


def area(boxes: Tensor) -> Tensor:
    """Area (...) of boxes (..., 4) in square pixels."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _square_boxes(boxes: Tensor, margin: float) -> Tensor:
    """(n, 4) corners -> (n, 3) centre x, centre y and side of an enlarged square round each box.

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
        faces: faces of these images, one row each. Placeholders give a chip, too: drop them before
            (`images[is_face]`, `faces[is_face]`) or after.
        size: side of the chips in pixels.
        margin: how much larger than the face's longer side the crop is.

    Returns:
        (n, 3, size, size), differentiable with respect to the images.

    Raises:
        ValueError: another number of faces than of images.
    """
    _check(images, faces)
    x, y, side = _square_boxes(faces.boxes.to(images), margin).unbind(1)  # (n,) each
    steps = _steps(images, size) - 0.5  # (fine,) in units of the side, from the centre
    columns = x[:, None] + side[:, None] * steps  # (n, fine) pixels
    rows = y[:, None] + side[:, None] * steps
    fine = len(steps)
    points = torch.stack(
        [columns[:, None, :].expand(-1, fine, -1), rows[:, :, None].expand(-1, -1, fine)], -1
    )  # (n, fine, fine, 2)
    return _sample(images, points, size)


def aligned_chips(images: Tensor, faces: Faces, size: int) -> Tensor:
    """Crop faces with eyes, nose and mouth at the positions that face embedders expect.

    The crop is rotated, scaled and shifted by the similarity that maps the landmarks to `TEMPLATE`
    with the least squared error (Umeyama, 1991). With points x, y as complex numbers x + iy, it is
    z -> a z + b, and a takes one complex division. The border is repeated outside the image.

    Args:
        images: (n, 3, h, w).
        faces: faces of these images, one row each, with landmarks. Placeholders give a chip, too.
        size: side of the chips in pixels.

    Returns:
        (n, 3, size, size), differentiable with respect to the images.

    Raises:
        ValueError: another number of faces than of images, or no landmarks.
    """
    _check(images, faces)
    if faces.landmarks is None:
        raise ValueError("expected faces with landmarks, got none: crop them with face_chips")
    landmarks = torch.view_as_complex(faces.landmarks.to(images).contiguous())  # (n, 5)
    template = torch.view_as_complex(torch.tensor(TEMPLATE).to(images)) * (size / _TEMPLATE_SIZE)
    centre, middle = landmarks.mean(1, keepdim=True), template.mean()
    spread = landmarks - centre
    match = (spread.conj() * (template - middle)).sum(1)  # (n,), a times the square of the spread
    back = spread.abs().square().sum(1) * match.conj() / match.abs().square().clamp_min(1e-12)
    steps = _steps(images, size) * size  # (fine,) pixels of the chip
    chip = torch.complex(*torch.meshgrid(steps, steps, indexing="xy"))  # (fine, fine)
    points = centre[:, :, None] + back[:, None, None] * (chip - middle)  # back is 1 / a
    return _sample(images, torch.view_as_real(points), size)


def _check(images: Tensor, faces: Faces) -> None:
    n = len(images)
    if len(faces) != n:
        raise ValueError(f"expected the faces of {n} images, one row each, got {len(faces)} rows")


def _steps(images: Tensor, size: int) -> Tensor:
    """(fine,) sampling positions along a chip's side, in (0, 1): one or more per pixel."""
    fine = size * ceil(max(images.shape[-2:]) / size)
    return (torch.arange(fine).to(images) + 0.5) / fine


def _sample(images: Tensor, points: Tensor, size: int) -> Tensor:
    """Chips (n, 3, size, size), whose pixels average samples at points (n, fine, fine, 2)."""
    h, w = images.shape[-2:]
    grid = 2 * points / points.new_tensor([w, h]) - 1  # in [-1, 1] of the image
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, points.shape[1] // size)
