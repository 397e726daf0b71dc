"""Pictures made by anything: a folder for each prompt, with its pictures in it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.evaluation.generate import Pictures
from diffusers_fair.vision.images import from_pillow

PROMPT = "prompt.txt"  # in a prompt's folder, where the folder's name is not the prompt
LARGEST = 1024  # pixels, of the square that pictures of different sizes are brought to


@dataclass(frozen=True)
class PictureFolder:
    """The prompts of a folder and the files of each."""

    folder: Path
    prompts: tuple[str, ...]
    files: tuple[tuple[Path, ...], ...]
    """Of each prompt, in the order of their names."""
    side: int | None
    """Pixels, of the square that every picture is fitted into; None: all have one size already."""

    def read(self, pairs: np.ndarray) -> Pictures:
        """The pictures j of prompts i, pairs (n, 2)."""
        files = [self.files[i][j] for i, j in pairs]
        images = torch.stack([_picture(file, self.side) for file in files])
        names = [file.relative_to(self.folder).as_posix() for file in files]
        prompt, image = pairs.T  # (n,) each
        return Pictures(images, prompt, image, file=np.array(names))

    def digest(self) -> str:
        """Of the names and sizes of all files: another one if pictures were changed."""
        files = [file for group in self.files for file in group]
        lines = [f"{file.relative_to(self.folder)} {file.stat().st_size}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def picture_folder(folder: str | Path) -> PictureFolder:
    """Find the pictures of a folder, and see that all can be read.

    Every folder in it is a prompt: the text in its `prompt.txt`, or else its own name. Pictures are
    whatever Pillow reads, told by their endings; other files are passed over. If they have
    different sizes, each is fitted into a square, with grey beside it: as large as the largest of
    them, at most 1024 pixels.

    Args:
        folder: with a folder for each prompt. One without pictures counts as a gap.

    Raises:
        ValueError: no such folder, no folders or no pictures in it, a picture that cannot be read,
            a prompt twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}': expected one with a folder per prompt")
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = tuple(tuple(_pictures_in(place)) for place in inside)
    if not any(files):
        loose = len(_pictures_in(folder))
        raise ValueError(
            f"'{folder}' has no folder with pictures ({loose} pictures lie in it directly): "
            "expected a folder for each prompt, named as the prompt"
        )
    prompts = [_prompt(place) for place in inside]
    twice = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    if twice:
        raise ValueError(f"'{folder}' has two folders of the prompt '{min(twice)}': make it one")
    sizes = {_size(file) for group in files for file in group}
    side = None if len(sizes) == 1 else min(LARGEST, max(max(size) for size in sizes))
    return PictureFolder(folder, tuple(prompts), files, side)


def _pictures_in(folder: Path) -> list[Path]:
    from PIL import Image

    endings = Image.registered_extensions()
    found = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in found if p.suffix.lower() in endings)


def _prompt(folder: Path) -> str:
    file = folder / PROMPT
    if not file.is_file():
        return folder.name
    try:
        text = " ".join(file.read_text("utf-8-sig").split())
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise ValueError(f"'{file}' holds no prompt: expected one as UTF-8 text")
    return text


def _size(file: Path) -> tuple[int, int]:
    """Width and height; reads all of the picture, so that a damaged one is told at once."""
    return _open(file).size


def _open(file: Path):
    """The picture upright, its transparent parts white, RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                seen = upright.convert("RGBA")
                white = Image.new("RGBA", seen.size, "white")
                return Image.alpha_composite(white, seen).convert("RGB")
            return upright.convert("RGB")
    except Exception as error:  # whatever a damaged file may cause
        raise ValueError(
            f"'{file}' cannot be read as a picture ({error}): mend it or take it out"
        ) from None


def _picture(file: Path, side: int | None) -> Tensor:
    """(3, h, w) in [-1, 1]."""
    from PIL import ImageOps

    picture = _open(file)
    if side is not None:
        picture = ImageOps.pad(picture, (side, side), color=(127, 127, 127))
    return from_pillow(picture)
