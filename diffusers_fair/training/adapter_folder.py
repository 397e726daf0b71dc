"""The adapter folders that training starts from and writes."""

import warnings
from pathlib import Path
from typing import Any

from diffusers_fair.adapters.export import read_exported_lora
from diffusers_fair.adapters.folder import read_adapter
from diffusers_fair.adapters.format import AdapterInfo, Lora, SoftTokens
from diffusers_fair.adapters.repository import local_folder
from diffusers_fair.adapters.tensors import Weights
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.attributes import Attribute
from diffusers_fair.config.schema import RunConfig
from diffusers_fair.families import family_of
from diffusers_fair.paths import expand
from diffusers_fair.prompts.groups import vocabulary


def adapter_components(config: RunConfig) -> dict[str, Lora | SoftTokens]:
    """Return the components of the recipe's adapter; alpha equals the rank, so LoRA is unscaled."""
    section = config.adapter
    layers = Lora(rank=section.rank, alpha=section.rank)
    tokens = SoftTokens(count=section.soft_tokens)
    return {name: tokens if name == "soft_tokens" else layers for name in section.components}


def load_initial_adapter(config: RunConfig, adapter: TrainableAdapter, fingerprint: str) -> None:
    """Load the weights of the adapter that a recipe starts from, if it names one.

    Args:
        config: the recipe.
        adapter: adapter into which the weights are loaded.
        fingerprint: fingerprint of the base model.

    Raises:
        ValueError: the adapter cannot be read, or has another base model or other components; or
            the LoRA file has no layers that fit.
    """
    name = config.adapter.init_from
    if name is None:
        return
    if (path := expand(name)).is_file():
        adapter.load(_read_file(path, adapter))
        return
    try:
        info, weights = read_adapter(local_folder(name))
    except ValueError as error:
        raise ValueError(
            f"adapter.init_from: {error}: train the recipe that writes it, or name another adapter "
            "of the same components"
        ) from error
    if info.fingerprint != fingerprint:
        raise ValueError(
            f"adapter.init_from: '{name}' was trained on '{info.base_model}', whose layers differ "
            f"from those of '{config.base.model}': name an adapter of this base"
        )
    if dict(info.components) != adapter.components:
        raise ValueError(
            f"adapter.init_from: expected the components {adapter.components}, as the recipe has "
            f"them, got {dict(info.components)} in '{name}': set adapter.components, adapter.rank "
            "and adapter.soft_tokens to those of the adapter"
        )
    adapter.load(weights)


def _read_file(path: Path, adapter: TrainableAdapter) -> Weights:
    """Read the layers that fit an adapter from a LoRA file of another program."""
    family = family_of(adapter.pipe).name
    try:
        weights, unused = read_exported_lora(path, family, adapter.weights())
    except ValueError as error:
        raise ValueError(f"adapter.init_from: {error}") from error
    if unused:
        warnings.warn(
            f"adapter.init_from: {unused} layers of '{path}' are not used, as the adapter does not "
            "have them",
            stacklevel=2,
        )
    return weights


def adapter_info(
    config: RunConfig,
    adapter: TrainableAdapter,
    attributes: list[Attribute],
    fingerprint: str,
    training: dict[str, Any],
) -> AdapterInfo:
    """Describe an adapter for `fair_adapter.json`.

    Args:
        config: the recipe.
        adapter: the adapter in training.
        attributes: the balanced attributes.
        fingerprint: fingerprint of the base model.
        training: cost of the training so far.
    """
    return AdapterInfo(
        base_model=config.base.model,
        base_revision=config.base.revision,
        fingerprint=fingerprint,
        family=family_of(adapter.pipe).name,
        components=adapter.components,
        attributes=tuple(attributes),
        words=vocabulary([section.wording() for section in config.attributes]),
        recipe=config.model_dump(mode="json", exclude={"output"}),
        training=training,
    )
