"""File names of generated images, which differ for different images on every file system."""

import re
import unicodedata
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_fair import atomic, strict_json

_PROMPT_BYTES, _ADAPTER_BYTES, _DIGEST = 80, 40, 10  # maximum lengths


def file_stems(
    prompts: Sequence[str], *, seed: int, adapter: str | None, settings: Sequence[Any]
) -> list[str]:
    """Return what the file names of each prompt's images begin with.

    It tells the first words of the prompt, the seed and the adapter. A digest of everything that
    the images depend on tells different images apart: names are cut, and case and punctuation do
    not count in them.

    Args:
        prompts: the prompts; the same prompt at another position has other images.
        seed: random seed of the noise.
        adapter: folder or Hub id of the adapter; None for the base model.
        settings: everything else that the images depend on; JSON values.
    """
    parts = re.split(r"[/\\]+", adapter or "")[-2:]  # a folder is often called just `adapter`
    label = _slug(" ".join(parts), _ADAPTER_BYTES) or ("adapter" if adapter else "base")
    stems = []
    for place, prompt in enumerate(prompts):
        identity = strict_json.dumps([prompt, place, seed, adapter, settings], sort_keys=True)
        digest = sha256(identity.encode()).hexdigest()[:_DIGEST]
        words = _slug(prompt, _PROMPT_BYTES) or "prompt"
        stems.append(f"{words}-seed{seed}-{label}-{digest}")
    return stems


def write_image(file: Path, image: np.ndarray) -> None:
    """Write an image (h, w, 3) as PNG, completely or not at all; its folder is created if needed.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "png")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, buffer.getvalue())


def _slug(text: str, length: int) -> str:
    """Keep letters and digits, in lower case, and at most so many bytes."""
    folded = unicodedata.normalize("NFKC", text.casefold())
    words = re.sub(r"[\W_]+", "-", folded).strip("-")
    return words.encode()[:length].decode(errors="ignore").strip("-")
