"""Shared by the trainings of the judges: data halves, face crops, metrics and files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from augment import blur, degrade, mirror, resample, restyle, uniform
from data import STYLES, Portraits, to_float
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_fair.testbed.judges import CHIP
from diffusers_fair.vision.faces import Faces, face_chips

CLASSES = {
    "gender": ("female", "male"),
    "race": ("WMELH", "Asian", "Black", "Indian"),
    "age": ("young", "old"),
}
COLUMNS = {"gender": "gender1", "race": "race1", "age": "age_group1"}
ROUND = 256  # portraits with every combination of gender, race, age and family once
WEIGHTS = Path(__file__).parents[2] / "diffusers_fair" / "testbed" / "weights"


def half(portraits: Portraits, odd: bool) -> np.ndarray:
    """Return the rows of the even or odd rounds of training portraits: odd for evaluation judges."""
    rows = portraits.where(kind="portrait", split="train")
    return rows[(portraits.labels["index"][rows] // ROUND) % 2 == int(odd)]


def boxes_of(portraits: Portraits, rows: np.ndarray, column: str = "face1") -> Tensor:
    """Return the labelled face boxes (n, 4) in pixels."""
    return torch.tensor(np.stack([portraits.labels[column][i] for i in rows]), dtype=torch.float32)


def class_numbers(portraits: Portraits, rows: np.ndarray) -> dict[str, Tensor]:
    """Map attributes to the class indices (n,) of the nearest person."""
    at = {name: portraits.labels[column][rows] for name, column in COLUMNS.items()}
    return {n: torch.tensor([CLASSES[n].index(v) for v in values]) for n, values in at.items()}


def jittered_chips(x: Tensor, boxes: Tensor, g: torch.Generator, amount: float = 0.08) -> Tensor:
    """Crop faces (n, 3, 64, 64) from boxes whose corners are moved by up to that share of a face."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    off = boxes + uniform(-amount, amount, tuple(boxes.shape), g) * sides
    return face_chips(x, Faces(off, torch.ones(len(x), dtype=torch.bool)), CHIP)


def training_chips(x: Tensor, boxes: Tensor, g: torch.Generator) -> Tensor:
    """Crop augmented faces (n, 3, 64, 64) from whole images (n, 3, h, h)."""
    mixed = torch.randperm(len(x), generator=g)
    x = degrade(restyle(x[mixed], g), g)[mixed.argsort()]
    return mirror(jittered_chips(x, boxes, g), g)


def conditions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the conditions in which judges are measured: sharp images, and degraded ones."""
    g = torch.Generator().manual_seed(7)
    ways = {
        "sharp": lambda x: x,
        "blurred": lambda x: blur(x, torch.full((len(x),), 1.0)),
        "resampled": lambda x: resample(x, 36),
        "noisy": lambda x: (x + 0.08 * torch.randn(x.shape, generator=g)).clamp(-1, 1),
    }
    return ways | {style: change for style, change in STYLES.items() if style != "photo"}


def settle(
    network: nn.Module, batch: Callable[[torch.Generator], Tensor], batches: int = 40
) -> None:
    """Recompute the batch norm statistics for the averaged weights."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain mean over the batches
    network.train()
    with torch.no_grad():
        for i in range(batches):
            network(batch(torch.Generator().manual_seed(10**9 + i)))
    network.eval()


@torch.no_grad()
def in_batches(call: Callable[[Tensor], Tensor], x: Tensor, size: int = 256) -> Tensor:
    """Apply a function to x in batches, without gradients."""
    return torch.cat([call(part) for part in x.split(size)])


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> list[list[int]]:
    """Count predictions: a row for each true class, a column for each predicted class."""
    return (
        torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, -1).tolist()
    )


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Return the share of correct predictions, rounded."""
    return round((predicted == truth).float().mean().item(), 4)


def images_of(portraits: Portraits, rows) -> Tensor:
    """Return images (n, 3, 64, 64) in [-1, 1]."""
    return to_float(portraits.images[torch.as_tensor(rows)])


def save_judge(network: nn.Module, file: Path, **metrics: object) -> None:
    """Save weights as float16, with held-out metrics as JSON in the metadata; print the metrics."""
    state = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, as_texts(metrics))
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


def as_texts(metrics: dict[str, object]) -> dict[str, str]:
    """Convert values to JSON texts for the metadata of safetensors, and print them."""
    texts = {name: json.dumps(value) for name, value in metrics.items()}
    for name, text in texts.items():
        print(f"{name}: {text}")
    return texts
