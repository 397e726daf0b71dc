"""Trains a classifier of one attribute on labelled face images, and measures its accuracy.

The images should be cropped as the judges crop faces: to a square 1.5 times the size of the face.
"""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_fair import atomic
from diffusers_fair.backends import trained_classifier
from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.sources import UrlFile
from diffusers_fair.backends.trained_classifier import MAX_SIZE
from diffusers_fair.console import progress_console
from diffusers_fair.devices import choose_device, choose_dtype
from diffusers_fair.folder_lock import folder_lock, has_files
from diffusers_fair.paths import require_writable
from diffusers_fair.training.labelled_images import LabelledImages
from diffusers_fair.training.stopping import SignalHandler, StoppedError, exit_code
from diffusers_fair.verbosity import shows_progress
from diffusers_fair.vision.encoders import Pixels
from diffusers_fair.vision.images import from_bytes, read_image

_TRIAL = 16  # images per update when the speed is measured
_MAX_INT = 2**63 - 1  # the largest that torch takes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the training.

    Raises:
        ValueError: a number is out of range.
    """

    size: int = 224
    """Side of the square input in pixels; 32 to 1024."""
    epochs: int = 5
    """Passes over the images."""
    batch_size: int = 64
    """Images per update; 2 or more."""
    lr: float = 1e-3
    """Initial learning rate of AdamW, above 0; it decays to 0 along a cosine."""
    held_out: float = 0.1
    """Fraction of each class that is held out to measure the accuracy, between 0 and 1."""
    seed: int = 0
    """Random seed; 0 or more."""
    pretrained: bool = True
    """Whether to start from ImageNet weights, which are downloaded once."""
    dtype: str = "float32"
    """Data type of the computation, as in `choose_dtype`; the weights are float32."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        ranges = {
            "size": (32, MAX_SIZE),
            "epochs": (1, math.inf),
            "batch_size": (2, _MAX_INT),
            "seed": (0, _MAX_INT),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                limit = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise ValueError(f"{name} must be {limit}, got {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out:g}")


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

    The same call resumes a training that was stopped.

    Args:
        images: labelled images.
        folder: output folder; recipes refer to the classifier as `checkpoint:FOLDER`.
        settings: options.
        device: as in `choose_device`.

    Returns:
        The contents of `classifier.json`, with `accuracy` on the held-out images and `confusion`
        (rows are true classes, columns predicted classes).

    Raises:
        StoppedError: stopped by Ctrl-C or SIGTERM; the message says how to resume.
        ValueError: the folder is not empty or cannot be written, another process is training in it,
            the device is not available, an image cannot be read, or ImageNet weights cannot be
            downloaded.
    """
    chosen = choose_device(device)
    folder = require_writable(folder)
    with folder_lock(folder), SignalHandler() as signals:
        return _train(images, folder, settings, chosen, signals)


def _train(
    images: LabelledImages,
    folder: Path,
    settings: Settings,
    device: torch.device,
    signals: SignalHandler,
) -> dict[str, Any]:
    dtype = choose_dtype(settings.dtype, device)
    checkpoint = _Checkpoint(folder, images, settings)
    g = torch.Generator().manual_seed(settings.seed)
    train, held = _hold_out(images.labels, settings.held_out, g)
    with _fork_rng(device):  # initial weights, dropout and augmentation
        torch.manual_seed(settings.seed)
        network = _network(
            len(images.classes), settings.pretrained and not checkpoint.file.exists()
        )
        network.to(device)
        _fit(network, images, train, settings, dtype, g, checkpoint, signals)
    if not all(weight.isfinite().all() for weight in network.state_dict().values()):
        checkpoint.file.unlink(missing_ok=True)
        raise ValueError(f"the training diverged: choose a lower lr than {settings.lr:g}")
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
    checkpoint.file.unlink(missing_ok=True)
    return facts


def _fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keep torch's random state within a `with` block."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _Checkpoint:
    """The state of a training that has not finished, in the folder of the classifier.

    Args:
        folder: the folder.
        images: labelled images.
        settings: options.

    Raises:
        ValueError: the folder holds something else, or another training.
    """

    def __init__(self, folder: Path, images: LabelledImages, settings: Settings):
        self.file = folder / "training.pt"
        self.identity = {
            "settings": asdict(settings),
            "classes": list(images.classes),
            "labels": images.labels.tolist(),
        }
        self.state: dict[str, Any] = {}
        if self.file.exists():
            self.state = self._read()
            if self.state["identity"] != self.identity:
                raise ValueError(
                    f"'{folder}' holds a training that was stopped, with other images or options: "
                    "give the same to resume it, or choose another folder"
                )
        elif folder.exists() and (not folder.is_dir() or has_files(folder)):
            raise ValueError(f"'{folder}' is not an empty folder: choose another folder")

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self.file, weights_only=True, map_location="cpu")
            assert "identity" in state
        except Exception as error:  # whatever a damaged file may cause
            raise ValueError(
                f"'{self.file}' is damaged, or no training that was stopped "
                f"({type(error).__name__}): remove it to start again, or choose another folder"
            ) from error
        return state

    def save(self, parts: Mapping[str, Any], epoch: int, done: int, order: Tensor) -> None:
        """Replace the state.

        Args:
            parts: name -> network, optimizer or schedule.
            epoch: index of the epoch.
            done: number of batches done in it.
            order: state of the generator that shuffles it.
        """
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"epoch": epoch, "done": done, "order": order, "rng": torch.get_rng_state()}
        buffer = BytesIO()
        torch.save({"identity": self.identity, **state}, buffer)
        atomic.write(self.file, buffer.getvalue())

    def restore(self, parts: Mapping[str, Any], g: torch.Generator) -> tuple[int, int]:
        """Restore the state, if there is one; return its epoch and the batches done in it."""
        if not self.state:
            return 0, 0
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        g.set_state(self.state["order"])
        torch.set_rng_state(self.state["rng"])
        return self.state["epoch"], self.state["done"]


def _stopped(checkpoint: _Checkpoint, where: str, signals: SignalHandler) -> StoppedError:
    return StoppedError(
        f"stopped {where}, which is saved in '{checkpoint.file}': give the same command again to "
        "resume",
        exit_code(signals.received),
    )


def imagenet_weights() -> UrlFile:
    """Return the file of the ImageNet weights that training starts from."""
    from torchvision.models import MobileNet_V3_Large_Weights

    weights = MobileNet_V3_Large_Weights.IMAGENET1K_V2
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    size = round(1e6 * weights.meta["_file_size"])
    # that of torchvision; the weights state none of their own
    licence = "BSD-3-Clause; trained on ImageNet, whose images have terms of their own"
    return UrlFile(weights.url, path, size, licence)


def seconds_per_image(settings: Settings) -> float:
    """Measure how long training takes per image and epoch on this machine, with images of noise."""
    count = 2 * _TRIAL
    once = replace(settings, epochs=1, batch_size=_TRIAL)
    g = torch.Generator().manual_seed(0)
    shape = (count, 3, settings.size, settings.size)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=g)
    images = LabelledImages([_encoded(image) for image in noise], torch.arange(count) % 2, ("", ""))
    device = choose_device()
    dtype = choose_dtype(settings.dtype, device)
    with TemporaryDirectory() as folder, _fork_rng(device):
        # a handler that is not entered leaves signals alone: nothing here is worth saving
        unused = _Checkpoint(Path(folder), images, once), SignalHandler()
        network = _network(2, pretrained=False).to(device)
        _fit(network, images, torch.arange(_TRIAL), once, dtype, g, *unused)  # the first is slower
        start = time.perf_counter()
        _fit(network, images, torch.arange(count), once, dtype, g, *unused)
    return (time.perf_counter() - start) / count


def _encoded(image: Tensor) -> bytes:
    """Encode an image (3, size, size) of bytes as a JPEG."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg")
    return file.getvalue()


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
    checkpoint: _Checkpoint,
    signals: SignalHandler,
) -> None:
    """Minimize the cross-entropy of augmented images, from the checkpoint on if it has a state."""
    from rich.progress import Progress
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
    parts: dict[str, Any] = {
        "network": network,
        "optimizer": optimizer,
        "schedule": schedule,
        "scaler": scaler,
    }
    first, done = checkpoint.restore(parts, g)
    network.train()
    with Progress(
        transient=True, console=progress_console(), disable=not shows_progress()
    ) as progress:
        for epoch in range(first, epochs):
            order_state = g.get_state()  # from which a resumed epoch gets the same order
            order = rows[torch.randperm(len(rows), generator=g)]
            batches = [b for b in order.split(settings.batch_size) if len(b) > 1]  # for batch norms
            title = f"epoch {epoch + 1} of {epochs}"
            task = progress.add_task(title, total=len(batches), completed=done)
            for count, batch in enumerate(batches[done:], done + 1):
                colours = (_load(images, batch, size) + 1) / 2  # (n, 3, size, size) in [0, 1]
                x = torch.stack([augment(image) for image in colours]).to(device) * 2 - 1
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = network(pixels(x))
                loss = F.cross_entropy(logits.float(), images.labels[batch].to(device))
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                progress.advance(task)
                if signals.received and count < len(batches):
                    checkpoint.save(parts, epoch, count, order_state)
                    raise _stopped(checkpoint, f"after batch {count} of {title}", signals)
            progress.remove_task(task)
            schedule.step()
            done = 0
            if epoch + 1 < epochs:
                checkpoint.save(parts, epoch + 1, 0, g.get_state())
                if signals.received:
                    raise _stopped(checkpoint, f"after {title}", signals)
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
        image = (
            read_image(BytesIO(file), f"row {row}") if isinstance(file, bytes) else read_image(file)
        )
        return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))

    return from_bytes(torch.stack([read(row) for row in rows.tolist()]))


def _confusion(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Count images by true class (row) and predicted class (column)."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(
        classes, classes
    )
