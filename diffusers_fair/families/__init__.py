"""Families of pipelines: the only modules that know how a pipeline is built."""

from typing import Any

from diffusers_fair.families.base import Family
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION

_FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION,)
LORA_PREFIXES = {
    component: prefix for family in _FAMILIES for component, prefix in family.lora_prefixes.items()
}
"""Component of any family that can have LoRA layers -> prefix of its keys in the weights file."""


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        ValueError: a pipeline of no known family.
    """
    for family in _FAMILIES:
        if family.matches(pipe):
            return family
    expected = " or ".join(family.name for family in _FAMILIES)
    raise ValueError(
        f"expected a pipeline of {expected}, got {type(pipe).__name__}: load a base model of this "
        "family, such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    )


def component(pipe: Any, name: str) -> Any:
    """Return a component of a pipeline without the wrapper that `torch.compile` puts around it."""
    model = getattr(pipe, name, None)
    return getattr(model, "_orig_mod", model)


def check_components(pipe: Any) -> None:
    """Refuse a pipeline that was made without a model, as with `text_encoder=None`.

    Raises:
        ValueError: a component that is not optional is missing.
    """
    optional = pipe._optional_components
    missing = [name for name, x in pipe.components.items() if x is None and name not in optional]
    if missing:
        raise ValueError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}: load the base model "
            "with all its components"
        )


def denoiser_of(pipe: Any) -> Any:
    """Return the model of a pipeline that is evaluated at every step.

    Raises:
        ValueError: a pipeline of no known family.
    """
    return getattr(pipe, family_of(pipe).denoiser)
