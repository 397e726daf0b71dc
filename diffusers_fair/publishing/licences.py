"""Licences of base models, which adapters inherit."""

from diffusers_fair.loading import MIRRORS

_LICENCES = {  # base model -> its licence, as the Hub names it; adapters have the same
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
}


def licence_of(base_model: str) -> str | None:
    """Return the licence of a base model as the Hub names it; None if it is not known."""
    return _LICENCES.get(MIRRORS.get(base_model, base_model))
