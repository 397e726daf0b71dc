"""The labelled portraits as tensors, and the image styles that captions can name."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers_fair.vision.images import from_bytes

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Portraits:
    """Images and their labels, row by row."""

    images: Tensor
    """(n, 3, 64, 64) uint8."""
    labels: dict[str, np.ndarray]
    """Column of the parquet file -> values (n,)."""

    def where(self, **equal: object) -> np.ndarray:
        """Return the indices of rows with the given labels."""
        keep = np.ones(len(self.images), bool)
        for name, value in equal.items():
            keep &= self.labels[name] == value
        return np.flatnonzero(keep)


def load_portraits(path: Path = HERE / "portraits64.parquet") -> Portraits:
    """Read the whole data set: 12,832 images, 158 MB."""
    table = pq.read_table(path)
    images = np.stack([np.asarray(Image.open(io.BytesIO(x.as_py()))) for x in table["image"]])
    labels = {
        name: np.array(
            table[name].to_pylist(), dtype=None if table[name].null_count == 0 else object
        )
        for name in table.column_names
        if name != "image"
    }
    return Portraits(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1]."""
    return from_bytes(images)


def oil_painting(x: Tensor) -> Tensor:
    """Turn images (n, 3, h, w) in [-1, 1] into oil paintings: Kuwahara filter in warm colours."""
    padded = F.pad(x, (3, 3, 3, 3), mode="reflect")
    mean = F.avg_pool2d(padded, 4, stride=1)  # (n, 3, h + 3, w + 3)
    spread = (F.avg_pool2d(padded**2, 4, stride=1) - mean**2).sum(1, keepdim=True)
    h, w = x.shape[-2:]
    quarters = [(slice(i, i + h), slice(j, j + w)) for i in (0, 3) for j in (0, 3)]
    flattest = torch.stack([spread[..., i, j] for i, j in quarters]).argmin(0)  # (n, 1, h, w)
    dabs = torch.stack([mean[..., i, j] for i, j in quarters])
    chosen = dabs.gather(0, flattest[None].expand(-1, -1, 3, -1, -1))[0]
    warm = torch.tensor([0.12, 0.0, -0.18]).view(1, 3, 1, 1)
    return (1.2 * chosen + warm).clamp(-1, 1)


def pencil_sketch(x: Tensor) -> Tensor:
    """Turn images (n, 3, h, w) in [-1, 1] into pencil sketches: colour dodge of the blurred negative."""
    grey = (x.mean(1, keepdim=True) + 1) / 2
    blurred = F.avg_pool2d(F.pad(grey, (4, 4, 4, 4), mode="reflect"), 9, stride=1)
    dodge = (grey / blurred.clamp(min=0.04)).clamp(0, 1)
    return ((0.75 * dodge + 0.25 * grey) * 2 - 1).expand(-1, 3, -1, -1).clamp(-1, 1)


STYLES = {"photo": lambda x: x, "oil painting": oil_painting, "pencil sketch": pencil_sketch}
