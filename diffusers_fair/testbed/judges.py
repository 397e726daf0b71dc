"""The testbed's judges: a face detector, classifiers and encoders.

Training and evaluation classifiers differ in architecture and were trained on different portraits.
The metadata of each judge's file holds its metrics on held-out images (`metadata`).
"""

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from diffusers_fair import strict_json
from diffusers_fair.testbed.models import SIZE, TOKENS, VOCABULARY
from diffusers_fair.testbed.tokenizer import tokenizer
from diffusers_fair.testbed.vocabulary import unpack
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import ClipEncoder, DinoEncoder, NetworkEncoder, Pixels
from diffusers_fair.vision.faces import Faces, area, faces_of_images, overlap

Network = TypeVar("Network", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"
CHIP = 64  # side of a face crop in pixels
_STRIDE = 8  # pixels between the cells of the face detector
EMBEDDING = 64  # dimensions


class FaceGrid(nn.Module):
    """A detection network: a grid of cells over the image, each with a face score and a box."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ResNetModel(_resnet([32, 64], [2, 3]))
        self.head = nn.Conv2d(64, 5, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n, cells) and boxes (n, cells, 4) in pixels for images (n, 3, h, w)."""
        raw = self.head(self.trunk(images).last_hidden_state)  # (n, 5, h / 8, w / 8)
        x, y = (centres.to(raw.device) for centres in cell_centres(*raw.shape[-2:]))
        left, up, right, down = (2 * _STRIDE * raw[:, 1:].flatten(2).exp()).unbind(1)
        return raw[:, 0].flatten(1), torch.stack([x - left, y - up, x + right, y + down], -1)


def cell_centres(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return x and y in pixels, (cells,) each, of the centres of a grid's cells."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (x.flatten() + 0.5) * _STRIDE, (y.flatten() + 0.5) * _STRIDE


class GridDetector:
    """An `EveryFaceDetector` that uses a `FaceGrid`."""

    def __init__(self, network: FaceGrid, threshold: float = 0.5):
        self.network = network
        self.threshold = threshold
        """Minimum score of a cell, in [0, 1]."""
        self.overlap = 0.4
        """Intersection over union above which two boxes are the same face."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """Find the largest face of each image."""
        logits, boxes = self.network(images)
        counts = logits.sigmoid() >= self.threshold  # (n, cells)
        return Faces(_largest(logits.sigmoid(), boxes, counts)[1], counts.any(1))

    @torch.no_grad()
    def all_faces(self, images: Tensor) -> Faces:
        """Find every face: repeatedly the largest, then ignore the cells that overlap it."""
        logits, boxes = self.network(images)
        scores, faces = logits.sigmoid(), boxes.new_zeros(0, 4)
        image = faces.new_zeros(0, dtype=torch.long)
        left = scores >= self.threshold  # (n, cells)
        while left.any():
            rows = left.any(1).nonzero().squeeze(1)
            largest, voted = _largest(scores[rows], boxes[rows], left[rows])
            image, faces = torch.cat([image, rows]), torch.cat([faces, voted])
            left[rows] &= overlap(boxes[rows], largest[:, None]) <= self.overlap
        return faces_of_images(faces, image, len(images))


def _largest(scores: Tensor, boxes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest counted box (n, 4), and the mean box of the cells that overlap it."""
    first = torch.where(counts, area(boxes), scores - 1).argmax(1)  # the best cell if none counts
    largest = boxes[torch.arange(len(boxes), device=boxes.device), first]
    agree = (overlap(boxes, largest[:, None]) > 0.5) * scores  # (n, cells)
    return largest, (agree[..., None] * boxes).sum(1) / agree.sum(1)[:, None].clamp(min=1e-6)


def attribute_network(classes: int) -> ResNetForImageClassification:
    """Create the training classifier: face crops -> logits of all attributes side by side."""
    return ResNetForImageClassification(_resnet([24, 48, 96, 160], [1, 1, 1, 1], classes))


def evaluation_network(classes: int) -> nn.Module:
    """Create an evaluation classifier: face crops or whole images -> logits."""
    from torchvision.models.densenet import DenseNet

    return DenseNet(24, (3, 4, 3), num_init_features=32, bn_size=2, num_classes=classes)


def embedding_network() -> ResNetForImageClassification:
    """Create the face embedder: face crops -> (n, 64)."""
    return ResNetForImageClassification(_resnet([24, 48, 96], [1, 1, 1], EMBEDDING))


def clip_network(vocabulary: int = VOCABULARY) -> CLIPModel:
    """Create the image-text encoder: whole images and texts -> (n, 64)."""
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING
        )
    )


def dino_network() -> Dinov2Model:
    """Create the image encoder: whole images -> class token (n, 96)."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=4,
            image_size=SIZE,
            patch_size=8,
            use_mask_token=False,
        )
    )


def freeze(network: Network, state: dict[str, Tensor]) -> Network:
    """Load weights as float32 into a network; return it in evaluation mode, without gradients."""
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )
    return network.eval().requires_grad_(False)


def cached_by_device(load: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function only once for each device and its other arguments."""

    @cache
    def load_once(*args: Any, device: torch.device, **options: Any) -> Any:
        return load(*args, device=device, **options)

    @wraps(load)
    def cached(*args: Any, device: torch.device | str = "cpu", **options: Any) -> Any:
        return load_once(*args, device=torch.device(device), **options)

    return cached


def metadata(name: str) -> dict:
    """Read the classes and held-out metrics that are stored with the weights of a judge."""
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return {key: strict_json.loads(text) for key, text in (file.metadata() or {}).items()}


@cached_by_device
def face_detector(*, device: torch.device) -> GridDetector:
    """Load the face detector."""
    return GridDetector(_load(FaceGrid(), "detector", device))


@cached_by_device
def classifier(name: str, *, evaluation: bool = False, device: torch.device) -> NetworkClassifier:
    """Load the classifier of an attribute.

    Args:
        name: name of the attribute.
        evaluation: whether to load the classifier that training never uses.
        device: device that it computes on.

    Raises:
        ValueError: there is no classifier for an attribute of that name.
    """
    file = "evaluation_classifiers" if evaluation else "classifiers"
    classes: dict[str, list[str]] = metadata(file)["classes"]
    if name not in classes:
        raise ValueError(f"the testbed has classifiers for {', '.join(classes)}, none for '{name}'")
    network = _attribute_trunk(evaluation, device=device)
    names = list(classes)
    start = sum(len(classes[other]) for other in names[: names.index(name)])
    columns = slice(start, start + len(classes[name]))
    return NetworkClassifier(
        lambda chips: network(chips)[:, columns],
        tuple(classes[name]),
        CHIP,
        confusion=tuple(map(tuple, metadata(file)["confusion"][name])),
    )


@cached_by_device
def family_classifier(*, device: torch.device) -> NetworkClassifier:
    """Load the classifier of the context family (clothes and background) of whole images."""
    classes = tuple(metadata("family_classifier")["classes"])
    network = _load(evaluation_network(len(classes)), "family_classifier", device)
    return NetworkClassifier(network, classes, SIZE)


@cached_by_device
def clip(*, device: torch.device) -> ClipEncoder:
    """Load the CLIP-like encoder of testbed images and captions."""
    state = unpack(WEIGHTS / "clip.safetensors", VOCABULARY)
    network = freeze(clip_network(), state)
    return ClipEncoder(nn.Module.to(network, device), tokenizer(), Pixels(SIZE))


@cached_by_device
def dino(*, device: torch.device) -> DinoEncoder:
    """Load the DINO-like encoder, which was trained on testbed images without labels."""
    return DinoEncoder(_load(dino_network(), "dino", device), Pixels(SIZE))


@cached_by_device
def face_embedder(*, device: torch.device) -> NetworkEncoder:
    """Load the face embedder."""
    network = _load(embedding_network(), "face_embedder", device)
    return NetworkEncoder(lambda chips: network(chips).logits, Pixels(CHIP))


@cached_by_device
def reference_faces(*, device: torch.device) -> Tensor:
    """Load unit-length embeddings (1024, 64), by `face_embedder`, of faces in portraits."""
    stored = load_file(WEIGHTS / "face_bank.safetensors")["embeddings"]  # as float16
    return nn.functional.normalize(stored.float(), dim=1).to(device)


@cached_by_device
def _attribute_trunk(evaluation: bool, *, device: torch.device):
    """Load the network that the classifiers of all attributes share."""
    file = "evaluation_classifiers" if evaluation else "classifiers"
    count = sum(map(len, metadata(file)["classes"].values()))
    if evaluation:
        return _load(evaluation_network(count), file, device)
    network = _load(attribute_network(count), file, device)
    return lambda chips: network(chips).logits


def _load(network: Network, name: str, device: torch.device) -> Network:
    """Load the weights of a judge into its network, and move it to the device."""
    return freeze(network, load_file(WEIGHTS / f"{name}.safetensors")).to(device)


def _resnet(widths: list[int], depths: list[int], outputs: int = 0) -> ResNetConfig:
    """Configure basic blocks after a stem of stride 4; each later stage halves the resolution."""
    config = ResNetConfig(embedding_size=24, hidden_sizes=widths, depths=depths, layer_type="basic")
    config.num_labels = outputs
    return config
