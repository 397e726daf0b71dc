"""Image-text encoders of open_clip."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.backends.errors import loading
from diffusers_fair.backends.needs import Need, package, pretrained
from diffusers_fair.vision.encoders import Pixels

PACKAGE = "open_clip"  # import name
_INSTALL = "pip install open_clip_torch"
_WEIGHTS = "open_clip_"  # beginning of the names of the files, next to those of transformers


@dataclass(frozen=True)
class OpenClipEncoder:
    """An `ImageTextEncoder` that wraps an open_clip model."""

    model: Any
    """`open_clip.CLIP`, or `CustomTextCLIP`."""
    tokenizer: Callable[[list[str]], Tensor]
    pixels: Pixels

    def __call__(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, h, w) in [-1, 1]: (n, d) of unit length."""
        return self.model.encode_image(self.pixels(images), normalize=True)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Embed texts: (n, d) of unit length."""
        tokens = self.tokenizer(texts).to(self.model.logit_scale.device)
        return self.model.encode_text(tokens, normalize=True)


def load(name: str, device: torch.device | str = "cpu") -> OpenClipEncoder:
    """Load an open_clip model.

    Args:
        name: `MODEL/WEIGHTS` as `open_clip.list_pretrained()` lists them, or a folder with
            `open_clip_config.json` and weights.
        device: device that it computes on, in float32.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: the model does not exist, or cannot be reached.
    """
    with loading(f"'{name}' of open_clip", "MODEL/WEIGHTS, or a folder", _INSTALL):
        import open_clip

        model, weights = _parts(name)
        network = open_clip.create_model(model, weights, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(model)
    cfg = network.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    pixels = Pixels(size, tuple(cfg["mean"]), tuple(cfg["std"]))
    return OpenClipEncoder(network.eval().requires_grad_(False), tokenizer, pixels)


def needs(name: str) -> list[Need]:
    """List the requirements of `load`."""
    installed = package(PACKAGE, _INSTALL)
    if not installed.available:
        return [installed]
    if Path(name).is_dir():
        return [installed, pretrained(name)]
    import open_clip

    repository = open_clip.get_pretrained_cfg(*_parts(name)).get("hf_hub", "")
    known = Need(name, bool(repository), "unknown to open_clip, or not on the Hub")
    if not repository:
        return [installed, known]
    model, _, file = repository.rpartition("/")
    return [installed, pretrained(model, prefix=Path(file).stem or _WEIGHTS)]


def _parts(name: str) -> tuple[str, str | None]:
    """Split a name into the architecture and the weights of open_clip."""
    if Path(name).is_dir():
        return f"local-dir:{name}", None
    model, slash, weights = name.partition("/")
    if not (model and slash and weights):
        raise ValueError(f"'{name}' is neither a folder nor of the form MODEL/WEIGHTS")
    return model, weights
