"""Image files, and conversion between images in [-1, 1], bytes and Pillow images."""

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def from_bytes(pixels: Tensor) -> Tensor:
    """Values in 0 to 255 -> float32 in [-1, 1]; the inverse of `to_bytes`."""
    return pixels.float() / 127.5 - 1


def to_arrays(images: Tensor) -> np.ndarray:
    """Images (..., 3, h, w) in [-1, 1] -> (..., h, w, 3) uint8, as Pillow takes them."""
    return to_bytes(images).movedim(-3, -1).cpu().numpy()


def from_pillow(image: "Image") -> Tensor:
    """An RGB image -> (3, h, w) in [-1, 1]."""
    return from_bytes(torch.from_numpy(np.array(image)).permute(2, 0, 1))


# ---- files ---------------------------------------------------------------------------------------

_16_BIT_FORMATS = ("PNG", "PPM")  # whose 16-bit pixels Pillow may read as 32-bit ones
_CAMERA_FORMAT = "MPO"  # a photo, followed by its previews


def image_files(folder: Path, pattern: str = "*") -> list[Path]:
    """List the image files of a folder in the order of their names, without hidden ones.

    Args:
        folder: the folder.
        pattern: `*` for the folder itself, `*/*` for its subfolders, `**/*` for everything below.

    Returns:
        Files with a suffix of a format that Pillow can read.
    """
    from PIL import Image

    endings = Image.registered_extensions()
    return sorted(
        file
        for file in folder.glob(pattern)
        if endings.get(file.suffix.lower()) in Image.OPEN
        and not is_hidden(file.relative_to(folder))
        and file.is_file()
    )


def is_hidden(path: Path) -> bool:
    """Whether a path is hidden, or is one that macOS adds to its archives."""
    return any(name.startswith(".") or name == "__MACOSX" for name in path.parts)


def read_image(file: "Path | IO[bytes]", name: str | None = None) -> "Image":
    """Read an image file as RGB, upright, with transparent parts white.

    Args:
        file: path or opened file.
        name: name in errors; default: the path.

    Raises:
        ValueError: the file is damaged, holds several images, or has pixels of unknown range.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            _check_one_image(opened)
            return _on_white(_with_8_bits(ImageOps.exif_transpose(opened), opened.format))
    except Exception as error:  # a damaged file may cause any
        raise ValueError(
            f"'{name or file}' cannot be read as an image ({error}): repair or remove it"
        ) from None


def _check_one_image(image: "Image") -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != _CAMERA_FORMAT:
        raise ValueError(f"expected one image, got an animation or document of {frames}")


def _with_8_bits(image: "Image", format: str | None) -> "Image":
    """Scale 16-bit pixels, which Pillow would clip to 255."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in _16_BIT_FORMATS):
        pixels = np.asarray(image).astype(float)
        grey = np.where(pixels == image.info.get("transparency"), 255, (pixels / 257).round())
        return Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):  # of unknown range; not converted by Pillow
        raise ValueError(f"expected grey, RGB or CMYK in 8 or 16 bits, got mode {image.mode}")
    return image


def _on_white(image: "Image") -> "Image":
    """Convert to RGB, with transparent parts white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
