"""The licence of a base model, which its adapters carry on."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from diffusers_fair.adapters.folder import README_FILE
from diffusers_fair.adapters.repository import REPOSITORY
from diffusers_fair.config.backends import SHIPPED_BASES
from diffusers_fair.loading import MIRRORS
from diffusers_fair.paths import expand

_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Licence:
    """A licence, as the metadata of model cards on the Hub state it."""

    license: str
    """Identifier on the Hub; `other` for a licence that has none."""
    license_name: str | None = None
    """Name of a licence that has no identifier."""
    license_link: str | None = None
    """URL of the text of a licence that has no identifier."""

    @property
    def title(self) -> str:
        """Return its name."""
        return self.license_name or self.license


_KNOWN = {
    **dict.fromkeys(SHIPPED_BASES, Licence("apache-2.0")),
    "CompVis/stable-diffusion-v1-4": Licence("creativeml-openrail-m"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Licence("creativeml-openrail-m"),
    "stabilityai/stable-diffusion-2": Licence("openrail++"),
    "stabilityai/stable-diffusion-2-base": Licence("openrail++"),
    "stabilityai/stable-diffusion-2-1": Licence("openrail++"),
    "stabilityai/stable-diffusion-2-1-base": Licence("openrail++"),
    "stabilityai/stable-diffusion-xl-base-1.0": Licence("openrail++"),
    "black-forest-labs/FLUX.1-schnell": Licence("apache-2.0"),
    **{
        base: Licence("other", name, f"{_HUB}/{base}/blob/main/LICENSE.md")
        for base, name in {
            "stabilityai/sdxl-turbo": "sai-nc-community",
            "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
            "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
            "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
            "stabilityai/stable-diffusion-3.5-large-turbo": "stabilityai-ai-community",
            "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
        }.items()
    },
}


def base_licence(base: str, revision: str | None = None) -> Licence | None:
    """Return the licence of a base model, from its card if this machine has it, or a known one.

    Args:
        base: Hub id, folder, or name of a shipped base.
        revision: commit, tag or branch on the Hub.
    """
    return _stated(base, revision) or _KNOWN.get(MIRRORS.get(base, base))


def _stated(base: str, revision: str | None) -> Licence | None:
    """Read the licence from the card of a base model in a folder or in the Hub's cache."""
    is_on_hub = REPOSITORY.fullmatch(base) is not None
    card: object = expand(base) / README_FILE
    if is_on_hub and not expand(base).is_dir():
        card = try_to_load_from_cache(base, README_FILE, revision=revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        data = ModelCard.load(card).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a card that nobody can read
        return None
    if not isinstance(data.license, str):
        return None
    link = data.license_link
    if link and "://" not in link:  # relative to the repository
        link = f"{_HUB}/{base}/blob/main/{link}" if is_on_hub else None
    return Licence(data.license, data.license_name, link)
