"""Existing images from a folder with a subfolder for each prompt."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.evaluation.generate import ImageBatch
from diffusers_fair.paths import expand
from diffusers_fair.prompts import normalized
from diffusers_fair.vision.images import from_pillow, image_files, is_hidden, read_image

PROMPT = "prompt.txt"  # holds the prompt if it is not the name of the subfolder
_MAX_SIDE = 1024  # maximum side of the square for images of different sizes, in pixels


@dataclass(frozen=True)
class ImageFolder:
    """The prompts of a folder, and the image files of each prompt."""

    folder: Path
    prompts: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    """Files of each prompt, in the order of their names."""
    side: int | None
    """Side in pixels of the square that every image is fitted into; None if all have one size."""

    def read(self, pairs: np.ndarray) -> ImageBatch:
        """Read images j of prompts i, given as indices (n, 2)."""
        files = [self.files[i][j] for i, j in pairs]
        images = torch.stack([_image(file, self.side) for file in files])
        names = [file.relative_to(self.folder).as_posix() for file in files]
        prompt, image = pairs.T  # (n,) each
        return ImageBatch(images, prompt, image, file=np.array(names))

    def digest(self) -> str:
        """Hash the names and sizes of all files."""
        files = [file for group in self.files for file in group]
        lines = [f"{file.relative_to(self.folder)} {file.stat().st_size}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def image_folder(folder: str | Path) -> ImageFolder:
    """List the images of a folder, and check that all can be read.

    Each subfolder holds the images of one prompt: the text of its `prompt.txt`, or else its name.
    All files with a suffix that Pillow can read are images; hidden and other files are ignored. If
    the images differ in size, each is fitted into a grey square as large as the largest image, but
    at most 1024 pixels wide.

    Args:
        folder: folder with a subfolder for each prompt. An empty one is a prompt without images.

    Raises:
        ValueError: there is no such folder, it has no subfolder with images, an image cannot be
            read, or two subfolders have the same prompt.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}': expected one with a subfolder per prompt")
    subfolders = sorted(
        p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.relative_to(folder))
    )
    files = tuple(tuple(image_files(place)) for place in subfolders)
    if not any(files):
        loose = len(image_files(folder))
        raise ValueError(
            f"'{folder}' has no subfolder with images (but {loose} images of its own): expected a "
            "subfolder for each prompt, named after the prompt"
        )
    prompts = [_prompt(place) for place in subfolders]
    duplicates = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    if duplicates:
        raise ValueError(
            f"'{folder}' has two subfolders for the prompt '{min(duplicates)}': merge them"
        )
    sizes = {_size(file) for group in files for file in group}
    side = None if len(sizes) == 1 else min(_MAX_SIDE, max(max(size) for size in sizes))
    return ImageFolder(folder, tuple(prompts), files, side)


def _prompt(folder: Path) -> str:
    file = folder / PROMPT
    if not file.is_file():
        return normalized(folder.name)
    try:
        text = normalized(" ".join(file.read_text("utf-8-sig").split()))
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise ValueError(f"'{file}' holds no prompt: expected one as UTF-8 text")
    return text


def _size(file: Path) -> tuple[int, int]:
    """Return width and height; decodes the whole image, so that a damaged one is found early."""
    return read_image(file).size


def _image(file: Path, side: int | None) -> Tensor:
    """(3, h, w) in [-1, 1]."""
    from PIL import ImageOps

    image = read_image(file)
    if side is not None:
        image = ImageOps.pad(image, (side, side), color=(127, 127, 127))
    return from_pillow(image)
