"""Trains a classifier of one attribute on labelled face images, and measures its accuracy.

The images should be cropped as the judges crop faces: to a square 1.5 times the size of the face.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_fair.backends import trained_classifier
from diffusers_fair.backends.errors import loading
from diffusers_fair.devices import choose_device, choose_dtype
from diffusers_fair.vision.encoders import Pixels
from diffusers_fair.vision.images import from_bytes

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class LabelledImages:
    """Face images with their classes."""

    files: Sequence[Path | bytes]
    """Paths of image files, or contents of image files."""
    labels: Tensor
    """(n,) indices into `classes`."""
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the training.

    Raises:
        ValueError: a number is out of range.
    """

    size: int = 224
    """Side of the square input in pixels; 32 or more."""
    epochs: int = 5
    """Passes over the images."""
    batch_size: int = 64
    """Images per update; 2 or more."""
    lr: float = 1e-3
    """Initial learning rate of AdamW; it decays to 0 along a cosine."""
    held_out: float = 0.1
    """Fraction of each class that is held out to measure the accuracy, between 0 and 1."""
    seed: int = 0
    """Random seed."""
    pretrained: bool = True
    """Whether to start from ImageNet weights, which are downloaded once."""
    dtype: str = "float32"
    """Data type of the computation, as in `choose_dtype`; the weights are float32."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in {"size": 32, "epochs": 1, "batch_size": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out:g}")


def read_images(source: str | Path, label: str = "label") -> LabelledImages:
    """List labelled images.

    Args:
        source: a folder with a subfolder of images for each class; or a parquet file, or a folder
            of parquet files, with a column `image` (contents, or a struct with `bytes`) and a
            column of labels.
        label: name of the label column. It holds words, or numbers with names in the file's
            metadata, as `datasets` writes them.

    Raises:
        ModuleNotFoundError: pyarrow, which parquet files need, is not installed.
        ValueError: no such file or column, or fewer than two images of a class.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"there is nothing at '{source}': expected a folder or a parquet file")
    parquet = source.suffix == ".parquet" or any(source.glob("*.parquet"))
    files, words, classes = _read_parquet(source, label) if parquet else _read_folder(source)
    counts = Counter(words)
    if len(counts) < 2 or min(counts.values()) < 2:
        raise ValueError(
            f"'{source}' must hold two or more classes with two or more images each, "
            f"got {dict(counts)}"
        )
    classes = [name for name in classes if counts[name]]
    return LabelledImages(
        files, torch.tensor([classes.index(word) for word in words]), tuple(classes)
    )


def _read_folder(source: Path) -> tuple[list[Path], list[str], list[str]]:
    """Return files, the class of each, and all classes."""
    files = sorted(f for f in source.glob("*/*") if f.suffix.lower() in _IMAGE_SUFFIXES)
    words = [file.parent.name for file in files]
    return files, words, sorted(set(words))


def _read_parquet(source: Path, label: str) -> tuple[list[bytes], list[str], list[str]]:
    """Return file contents, the class of each, and all classes."""
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "parquet files need the package 'pyarrow': pip install pyarrow", name=error.name
        ) from error
    names = pq.ParquetDataset(source).schema.names
    for column in ("image", label):
        if column not in names:
            raise ValueError(f"'{source}' has no column '{column}', it has {', '.join(names)}")
    table = pq.read_table(source, columns=["image", label])
    files = [x["bytes"] if isinstance(x, dict) else x for x in table["image"].to_pylist()]
    values = table[label].to_pylist()
    known = _named_labels(table.schema.metadata or {}, label)
    if known:
        return files, [known[value] for value in values], known
    words = list(map(str, values))
    return files, words, sorted(set(words))


def _named_labels(metadata: dict[bytes, bytes], label: str) -> list[str]:
    """Return the names of numbered labels, as the library `datasets` stores them."""
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    return info.get("features", {}).get(label, {}).get("names", [])


def _hold_out(labels: Tensor, share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and the held-out rows, one or more of each class."""
    train, held = [], []
    for name in labels.unique():
        rows = (labels == name).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=g)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train), torch.cat(held)


def train_classifier(
    images: LabelledImages, folder: str | Path, settings: Settings, device: str = "auto"
) -> dict[str, Any]:
    """Train a MobileNetV3-Large, measure it on held-out images, and write its folder.

    Args:
        images: labelled images.
        folder: output folder; recipes refer to the classifier as `checkpoint:FOLDER`.
        settings: options.
        device: as in `choose_device`.

    Returns:
        The contents of `classifier.json`, with `accuracy` on the held-out images and `confusion`
        (rows are true classes, columns predicted classes).

    Raises:
        ValueError: the folder is not empty, the device is not available, or ImageNet weights cannot
            be downloaded.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"'{folder}' is not an empty folder: choose another folder")
    chosen = choose_device(device)
    dtype = choose_dtype(settings.dtype, chosen)
    g = torch.Generator().manual_seed(settings.seed)
    train, held = _hold_out(images.labels, settings.held_out, g)
    with torch.random.fork_rng():  # initial weights, dropout and augmentation
        torch.manual_seed(settings.seed)
        network = _network(len(images.classes), settings.pretrained)
        network.to(chosen)
        _fit(network, images, train, settings, dtype, g)
    predictions = _predict(network, images, held, settings)
    confusion = _confusion(images.labels[held], predictions, len(images.classes))
    facts = {
        "architecture": "mobilenet_v3_large",
        "classes": list(images.classes),
        "size": settings.size,
        "accuracy": round(confusion.trace().item() / len(held), 4),
        "confusion": confusion.tolist(),
        "pictures": {"trained on": len(train), "held out": len(held)},
        "settings": asdict(settings),
    }
    trained_classifier.write(folder, network, facts)
    return facts


def _network(classes: int, pretrained: bool) -> nn.Module:
    """Make a network with ImageNet weights except in the last layer, or with random weights."""
    from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large

    if not pretrained:
        return trained_classifier.mobilenet(classes)
    with loading("ImageNet's weights", "a network, or to start without them: --no-pretrained"):
        network: Any = mobilenet_v3_large(weights=MobileNet_V3_Large_Weights.IMAGENET1K_V2)
    network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, classes)
    return network


def _fit(
    network: nn.Module,
    images: LabelledImages,
    rows: Tensor,
    settings: Settings,
    dtype: torch.dtype,
    g: torch.Generator,
) -> None:
    """Minimize the cross-entropy of augmented images."""
    from rich.progress import track
    from torchvision.transforms import v2

    size, epochs = settings.size, settings.epochs
    augment = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1.1)),
            v2.ColorJitter(0.2, 0.2, 0.2),
        ]
    )
    device = next(network.parameters()).device
    pixels = Pixels(size, trained_classifier.MEAN, trained_classifier.STD)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=g)]
        batches = [b for b in order.split(settings.batch_size) if len(b) > 1]  # for the batch norms
        for batch in track(batches, f"epoch {epoch + 1} of {epochs}", transient=True):
            colours = (_load(images, batch, size) + 1) / 2  # (n, 3, size, size) in [0, 1]
            x = torch.stack([augment(image) for image in colours]).to(device) * 2 - 1
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = network(pixels(x))
            loss = F.cross_entropy(logits.float(), images.labels[batch].to(device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
    # recompute the statistics of the batch norms, whose momentum is too small for few images
    plain = (pixels(_load(images, batch, size)) for batch in batches)
    torch.optim.swa_utils.update_bn(plain, network, device)


@torch.no_grad()
def _predict(
    network: nn.Module, images: LabelledImages, rows: Tensor, settings: Settings
) -> Tensor:
    """Predict class indices (n,)."""
    device = next(network.parameters()).device
    pixels = Pixels(settings.size, trained_classifier.MEAN, trained_classifier.STD)
    network.eval()
    batches = (_load(images, b, settings.size) for b in rows.split(settings.batch_size))
    return torch.cat([network(pixels(x.to(device))).argmax(1).cpu() for x in batches])


def _load(images: LabelledImages, rows: Tensor, size: int) -> Tensor:
    """Read images (n, 3, size, size) in [-1, 1]; those that are not square are cropped."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    def read(row: int) -> Tensor:
        file = images.files[row]
        image = Image.open(BytesIO(file) if isinstance(file, bytes) else file).convert("RGB")
        return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))

    return from_bytes(torch.stack([read(row) for row in rows.tolist()]))


def _confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Count images by true class (row) and predicted class (column)."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(
        classes, classes
    )
