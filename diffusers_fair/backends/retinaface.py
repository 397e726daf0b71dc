"""RetinaFace (Deng et al., 2020): face detector of the package retinaface-pytorch.

The package pins old versions of its dependencies, so it is installed without them. Only its network
and its code for boxes are used, which do not need them. Pre- and postprocessing are done here, for
a whole batch at once.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, file, package
from diffusers_fair.backends.sources import UrlFile
from diffusers_fair.vision.faces import Faces, area, faces_of_images

_INSTALL = "pip install --no-deps retinaface-pytorch"
URL = (
    "https://github.com/ternaus/retinaface/releases/download/0.01/"
    "retinaface_resnet50_2020-07-20-f168fae3c.zip"
)
_SIZE = 102_000_000  # bytes, of the release, rounded
# that of the repository of URL; the weights state none of their own
_LICENCE = "MIT; trained on WIDER FACE, whose images have terms of their own"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per channel, of values in [0, 1]
_ANCHORS = {"min_sizes": [[16, 32], [64, 128], [256, 512]], "steps": [8, 16, 32], "clip": False}
_VARIANCE = (0.1, 0.2)  # scales of the predicted offsets and logarithmic sizes


@dataclass(frozen=True)
class RetinaFaceDetector:
    """An `EveryFaceDetector` with landmarks."""

    network: Any
    """`retinaface.network.RetinaFace`."""
    threshold: float = 0.7
    """Minimum score of a face, in [0, 1]."""
    overlap: float = 0.4
    """Intersection over union above which two boxes are the same face: the higher score is kept."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """Find the largest face of each image (n, 3, h, w) in [-1, 1], with landmarks."""
        boxes, scores, landmarks = self._candidates(images)
        image, place = self._kept(boxes, scores)
        areas = torch.zeros_like(scores)
        areas[image, place] = area(boxes[image, place])
        largest, has_face = areas.argmax(1), areas.amax(1) > 0
        rows = torch.arange(len(images), device=images.device)
        return Faces(boxes[rows, largest], has_face, landmarks[rows, largest])

    @torch.no_grad()
    def all_faces(self, images: Tensor) -> Faces:
        """Find every face of each image (n, 3, h, w) in [-1, 1], with landmarks."""
        boxes, scores, landmarks = self._candidates(images)
        kept = self._kept(boxes, scores)
        return faces_of_images(boxes[kept], kept[0], len(images), landmarks[kept])

    def _kept(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and anchor, (m,) each, of the faces after non-maximum suppression."""
        from torchvision.ops import batched_nms

        image, place = (scores > self.threshold).nonzero(as_tuple=True)
        kept = batched_nms(boxes[image, place], scores[image, place], image, self.overlap)
        return image[kept], place[kept]

    def _candidates(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (n, a, 4) in pixels, scores (n, a) and landmarks (n, a, 5, 2)."""
        from retinaface.box_utils import decode, decode_landm

        n, _, h, w = images.shape
        mean, std = (torch.tensor(v).to(images).view(3, 1, 1) for v in (MEAN, STD))
        offsets, logits, points = self.network(((images + 1) / 2 - mean) / std)
        anchors = _anchors(h, w).to(images).repeat(n, 1)  # (n a, 4), relative to the image size
        scale = torch.tensor([w, h]).to(images)
        boxes = decode(offsets.flatten(0, 1), anchors, _VARIANCE).view(n, -1, 2, 2) * scale
        landmarks = decode_landm(points.flatten(0, 1), anchors, _VARIANCE).view(n, -1, 5, 2) * scale
        return boxes.flatten(2), logits.softmax(-1)[..., 1], landmarks


def load(device: torch.device | str = "cpu") -> RetinaFaceDetector:
    """Load RetinaFace with a ResNet-50, trained on WIDER FACE; downloads 105 MB once.

    Raises:
        ModuleNotFoundError: retinaface-pytorch is not installed.
        ValueError: the weights cannot be downloaded, or do not fit the network.
    """
    with loading("RetinaFace", f"{URL}, or that file as '{_weights()}'", _INSTALL):
        from retinaface.network import RetinaFace

        network = RetinaFace(
            name="Resnet50",
            pretrained=False,
            return_layers={"layer2": 1, "layer3": 2, "layer4": 3},
            in_channels=256,
            out_channels=256,
        )
        network.load_state_dict(
            torch.hub.load_state_dict_from_url(URL, map_location="cpu", weights_only=True)
        )
    return RetinaFaceDetector(network.to(device).eval().requires_grad_(False))


def needs() -> list[Need]:
    """List the requirements of `load`."""
    path = _weights()
    weights = file(path, f"download {URL} to '{path}'", UrlFile(URL, path, _SIZE, _LICENCE))
    return [package("torchvision"), package("retinaface", _INSTALL), weights]


def _weights() -> Path:
    """Return the path where torch caches the weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]


@cache
def _anchors(h: int, w: int) -> Tensor:
    """Return centres and sizes (a, 4) of the anchors, relative to the image size."""
    from retinaface.prior_box import priorbox

    return priorbox(image_size=(h, w), **_ANCHORS)
