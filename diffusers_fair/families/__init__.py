"""Families of pipelines: the only modules that know how a pipeline is built."""

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from diffusers_fair.families.aura_flow import AURA_FLOW
from diffusers_fair.families.base import Family
from diffusers_fair.families.conditioning import Conditioning, concatenate, select
from diffusers_fair.families.flux import FLUX
from diffusers_fair.families.flux2_klein import FLUX2_KLEIN
from diffusers_fair.families.lumina2 import LUMINA2
from diffusers_fair.families.sana import SANA
from diffusers_fair.families.stable_diffusion import STABLE_DIFFUSION
from diffusers_fair.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from diffusers_fair.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from diffusers_fair.families.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    STABLE_DIFFUSION_3,
    FLUX,
    SANA,
    Z_IMAGE,
    LUMINA2,
    AURA_FLOW,
    FLUX2_KLEIN,
)
EMBEDDING_KEYS = [
    keys for family in FAMILIES if (keys := [key for key in family.embedding_keys.values() if key])
]
"""Keys of the tensors of soft tokens in families that have several text encoders for them."""
LORA_PREFIXES = {
    component: prefix for family in FAMILIES for component, prefix in family.lora_prefixes.items()
}
"""Component of any family that can have LoRA layers -> prefix of its keys in the weights file."""


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        ValueError: a pipeline of no known family.
    """
    if (family := find_family(pipe)) is not None:
        return family
    expected = " or ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"expected a pipeline of {expected}, got {type(pipe).__name__}: load a base model of this "
        "family, such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    )


def find_family(pipe: Any) -> Family | None:
    """Return the family of a pipeline; None if it is of no known family."""
    return next((family for family in FAMILIES if family.matches(pipe)), None)


def find_family_by_classes(
    classes: Mapping[str, str], config: Mapping[str, Any] | None = None
) -> Family | None:
    """Return the family of a pipeline that is not loaded.

    Args:
        classes: name of a component -> name of its class, as in `model_index.json`.
        config: the other entries of that file.
    """
    unknown = {"config": SimpleNamespace(guidance_embeds=None)}  # in the component's own folder
    components = {name: type(class_name, (), unknown)() for name, class_name in classes.items()}
    return find_family(SimpleNamespace(**components, config=config or {}))


def component(pipe: Any, name: str) -> Any:
    """Return a component of a pipeline without the wrapper that `torch.compile` puts around it."""
    model = getattr(pipe, name, None)
    return getattr(model, "_orig_mod", model)


def soft_token_encoders(pipe: Any) -> dict[str, tuple[Any, Any]]:
    """Return the text encoders that soft tokens are trained for.

    Returns:
        Name of the text encoder -> the text encoder and its tokenizer.
    """
    family = family_of(pipe)
    return {
        name: (component(pipe, name), getattr(pipe, family.inversions[name]))
        for name in family.embedding_keys
    }


def embedding_keys(pipe: Any, token: str) -> dict[str, str]:
    """Return the text encoders that soft tokens are trained for, and the keys of their tensors.

    Args:
        pipe: a pipeline of a known family.
        token: placeholder of the soft tokens, which is the key if there is one text encoder.
    """
    return {name: key or token for name, key in family_of(pipe).embedding_keys.items()}


def encoders_of_keys(keys: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return where soft tokens belong whose tensors have these of `EMBEDDING_KEYS`.

    Returns:
        Key, text encoder and tokenizer; empty for a placeholder, which needs no explanation.
    """
    found = {*keys}
    return [
        (key, encoder, family.inversions[encoder])
        for family in FAMILIES
        for encoder, key in family.embedding_keys.items()
        if key in found and {*family.embedding_keys.values()} <= found
    ]


def module_prefix(model: Any, lora_prefix: str) -> str:
    """Return the level of a weights file's keys that a model has too, such as `text_model.`.

    CLIP's text encoder with a projection has it, the one without lost it in transformers 5.
    """
    level = lora_prefix.partition(".")[2]
    return level if level.removesuffix(".") in dict(model.named_children()) else ""


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


def encode_negatives(pipe: Any, texts: Sequence[str]) -> Conditioning:
    """Encode negative prompts; the empty one is the unconditional branch, as without any.

    Args:
        pipe: a pipeline of a known family.
        texts: n negative prompts.

    Returns:
        Tensors with n rows.

    Raises:
        ValueError: a pipeline of no known family.
    """
    family = family_of(pipe)
    distinct = list(dict.fromkeys(text for text in texts if text))
    parts = [family.unconditional(pipe)]
    if distinct:
        parts.append(family.encode(pipe, distinct, prefix=False))
    rows = torch.tensor([distinct.index(text) + 1 if text else 0 for text in texts])
    return select(concatenate(parts), rows)


def denoiser_of(pipe: Any) -> Any:
    """Return the model of a pipeline that is evaluated at every step.

    Raises:
        ValueError: a pipeline of no known family.
    """
    return getattr(pipe, family_of(pipe).denoiser)
