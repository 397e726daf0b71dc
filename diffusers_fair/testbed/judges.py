"""The testbed's judges: a face detector, classifiers and encoders.

The classifiers of training and those of evaluation differ in architecture and were trained on
different portraits. Held-out metrics of each judge are in the metadata of its file (`figures`).
"""

import json
from functools import cache
from pathlib import Path
from typing import TypeVar

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

from diffusers_fair.testbed.models import SIZE, TOKENS, VOCABULARY
from diffusers_fair.testbed.tokenizer import tokenizer
from diffusers_fair.testbed.vocabulary import unpack
from diffusers_fair.vision.classifiers import NetworkClassifier
from diffusers_fair.vision.encoders import ClipEncoder, DinoEncoder, NetworkEncoder, Pixels
from diffusers_fair.vision.faces import Faces, area, faces_of_images, overlap

Network = TypeVar("Network", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"
CHIP = 64  # pixels
STRIDE = 8  # pixels between the cells of the face detector
EMBEDDING = 64  # numbers per face


class FaceGrid(nn.Module):
    """A grid of cells over the image, each with a face's score and box."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = ResNetModel(_resnet([32, 64], [2, 3]))
        self.head = nn.Conv2d(64, 5, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, h, w) -> logits (n, cells) and boxes (n, cells, 4) in pixels."""
        raw = self.head(self.trunk(images).last_hidden_state)  # (n, 5, h / 8, w / 8)
        x, y = cell_centres(*raw.shape[-2:])
        left, up, right, down = (2 * STRIDE * raw[:, 1:].flatten(2).exp()).unbind(1)
        return raw[:, 0].flatten(1), torch.stack([x - left, y - up, x + right, y + down], -1)


def cell_centres(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Columns and rows in pixels, (cells,) each, of the centres of a grid's cells."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (x.flatten() + 0.5) * STRIDE, (y.flatten() + 0.5) * STRIDE


class GridDetector:
    """An `EveryFaceDetector` out of a `FaceGrid`."""

    def __init__(self, network: FaceGrid, threshold: float = 0.5):
        self.network = network
        self.threshold = threshold
        """Score in [0, 1] from which a cell counts."""
        self.overlap = 0.4
        """Intersection over union above which two boxes are of one face."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """Find the largest face of each image."""
        logits, boxes = self.network(images)
        counts = logits.sigmoid() >= self.threshold  # (n, cells)
        return Faces(_largest(logits.sigmoid(), boxes, counts)[1], counts.any(1))

    @torch.no_grad()
    def all_faces(self, images: Tensor) -> Faces:
        """Find every face: repeatedly the largest, ignoring the cells of those already found."""
        logits, boxes = self.network(images)
        scores, image, faces = logits.sigmoid(), torch.zeros(0).long(), boxes.new_zeros(0, 4)
        left = scores >= self.threshold  # (n, cells)
        while left.any():
            rows = left.any(1).nonzero().squeeze(1)
            largest, voted = _largest(scores[rows], boxes[rows], left[rows])
            image, faces = torch.cat([image, rows]), torch.cat([faces, voted])
            left[rows] &= overlap(boxes[rows], largest[:, None]) <= self.overlap
        return faces_of_images(faces, image, len(images))


def _largest(scores: Tensor, boxes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The largest box (n, 4) of the cells that count, and the mean box of cells that overlap it."""
    first = torch.where(counts, area(boxes), scores - 1).argmax(1)  # none counts: the best cell
    largest = boxes[torch.arange(len(boxes)), first]
    agree = (overlap(boxes, largest[:, None]) > 0.5) * scores  # (n, cells)
    return largest, (agree[..., None] * boxes).sum(1) / agree.sum(1)[:, None].clamp(min=1e-6)


def attribute_network(classes: int) -> ResNetForImageClassification:
    """Chips -> logits of all attributes side by side: the classifiers of training."""
    return ResNetForImageClassification(_resnet([24, 48, 96, 160], [1, 1, 1, 1], classes))


def evaluation_network(classes: int) -> nn.Module:
    """Chips or whole images -> logits: the classifiers of evaluation."""
    from torchvision.models.densenet import DenseNet

    return DenseNet(24, (3, 4, 3), num_init_features=32, bn_size=2, num_classes=classes)


def embedding_network() -> ResNetForImageClassification:
    """Chips -> (n, 64)."""
    return ResNetForImageClassification(_resnet([24, 48, 96], [1, 1, 1], EMBEDDING))


def clip_network(vocabulary: int = VOCABULARY) -> CLIPModel:
    """Whole images and texts -> (n, 64)."""
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
    """Whole images -> class token (n, 96)."""
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
    """Load the weights as float32; return the network in evaluation mode, without gradients."""
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    )
    return network.eval().requires_grad_(False)


def figures(name: str) -> dict:
    """Read the classes and held-out metrics that are stored with the weights of a judge."""
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return {key: json.loads(text) for key, text in (file.metadata() or {}).items()}


@cache
def face_detector() -> GridDetector:
    """Detects the largest face of testbed images."""
    return GridDetector(freeze(FaceGrid(), load_file(WEIGHTS / "detector.safetensors")))


@cache
def classifier(name: str, *, evaluation: bool = False) -> NetworkClassifier:
    """The testbed's classifier of one attribute.

    Args:
        name: name of the attribute.
        evaluation: the classifier that training never sees.

    Raises:
        ValueError: no classifier for an attribute of that name.
    """
    file = "evaluation_classifiers" if evaluation else "classifiers"
    classes: dict[str, list[str]] = figures(file)["classes"]
    if name not in classes:
        raise ValueError(f"the testbed has classifiers for {', '.join(classes)}, none for '{name}'")
    network = _attribute_trunk(evaluation)
    names = list(classes)
    start = sum(len(classes[other]) for other in names[: names.index(name)])
    columns = slice(start, start + len(classes[name]))
    return NetworkClassifier(
        lambda chips: network(chips)[:, columns],
        tuple(classes[name]),
        CHIP,
        confusion=tuple(map(tuple, figures(file)["confusion"][name])),
    )


@cache
def family_classifier() -> NetworkClassifier:
    """Classifies the context family, clothes and background, of a whole testbed image."""
    classes = tuple(figures("family_classifier")["classes"])
    state = load_file(WEIGHTS / "family_classifier.safetensors")
    return NetworkClassifier(freeze(evaluation_network(len(classes)), state), classes, SIZE)


@cache
def clip() -> ClipEncoder:
    """CLIP-like: embeds testbed images and captions in one space."""
    state = unpack(WEIGHTS / "clip.safetensors", VOCABULARY)
    return ClipEncoder(freeze(clip_network(), state), tokenizer(), Pixels(SIZE))


@cache
def dino() -> DinoEncoder:
    """DINO-like: trained on testbed images without labels."""
    return DinoEncoder(
        freeze(dino_network(), load_file(WEIGHTS / "dino.safetensors")), Pixels(SIZE)
    )


@cache
def face_embedder() -> NetworkEncoder:
    """Embeds face chips."""
    network = freeze(embedding_network(), load_file(WEIGHTS / "face_embedder.safetensors"))
    return NetworkEncoder(lambda chips: network(chips).logits, Pixels(CHIP))


@cache
def face_bank() -> Tensor:
    """Embeddings (1024, 64) by `face_embedder` of faces in portraits, of unit length."""
    stored = load_file(WEIGHTS / "face_bank.safetensors")["embeddings"]  # as float16
    return nn.functional.normalize(stored.float(), dim=1)


@cache
def _attribute_trunk(evaluation: bool):
    """The network that the classifiers of all attributes share: chips -> logits side by side."""
    file = "evaluation_classifiers" if evaluation else "classifiers"
    count = sum(map(len, figures(file)["classes"].values()))
    state = load_file(WEIGHTS / f"{file}.safetensors")
    if evaluation:
        return freeze(evaluation_network(count), state)
    network = freeze(attribute_network(count), state)
    return lambda chips: network(chips).logits


def _resnet(widths: list[int], depths: list[int], outputs: int = 0) -> ResNetConfig:
    """Basic blocks behind a stem of stride 4; each stage but the first halves the grid."""
    config = ResNetConfig(embedding_size=24, hidden_sizes=widths, depths=depths, layer_type="basic")
    config.num_labels = outputs
    return config
