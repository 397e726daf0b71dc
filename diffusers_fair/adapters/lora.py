"""Low-rank adapters in a text encoder and a U-Net, and their weights in diffusers' layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.adapters.format import PREFIXES

TARGETS = {
    "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),  # attention, MLP
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),  # attention
}
"""Layers that get an adapter, by component of the pipeline."""


def add_lora(
    pipe: Any,
    component: str,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    adapter_name: str = "fair",
) -> list[nn.Parameter]:
    """Freeze a component of a pipeline and add a trainable LoRA to it, which changes nothing yet.

    Args:
        pipe: a Stable Diffusion pipeline.
        component: `"text_encoder"` or `"unet"`.
        rank: of the adapter's matrices.
        alpha: their product is scaled by alpha / rank; the rank itself by default.
        seed: of their initial values.
        adapter_name: what peft calls it.

    Returns:
        The adapter's parameters, in float32 or better whatever the component is in.

    Raises:
        ValueError: an unknown component, or one that has an adapter of this name already.
    """
    from peft import LoraConfig

    if component not in TARGETS:
        raise ValueError(f"LoRA goes into one of {sorted(TARGETS)}, got {component!r}")
    module = getattr(pipe, component)
    if adapter_name in getattr(module, "peft_config", {}):
        raise ValueError(
            f"the {component} has an adapter '{adapter_name}' already: "
            "unload it first, or choose another adapter_name"
        )
    module.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,  # type: ignore[arg-type]  # peft divides it, any number will do
            target_modules=list(TARGETS[component]),
        )
        module.add_adapter(config, adapter_name=adapter_name)
    parameters = trainable_parameters(module)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a module that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def without_adapter(pipe: Any) -> Iterator[None]:
    """Switch every low-rank layer of the pipeline off: the original model, for the time being."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [  # peft does not type them as modules
        layer
        for component in TARGETS
        for layer in getattr(pipe, component).modules()
        if isinstance(layer, LoraLayer)
    ]
    trained = [parameter for layer in layers for parameter in trainable_parameters(layer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:  # switching off freezes them as well
            parameter.requires_grad_(True)


def lora_tensors(pipe: Any, *, adapter_name: str = "fair") -> dict[str, Tensor]:
    """Return the adapter's weights themselves, from every component that has it; empty if none has.

    Returns:
        Keys in diffusers' own layout, so that `pipe.load_lora_weights` takes it, in any version:
        transformers 5 dropped the `text_model` level of the text encoder, the layout has it.
    """
    from peft import get_peft_model_state_dict

    weights = {}
    for component, prefix in PREFIXES.items():
        module = getattr(pipe, component)
        if adapter_name not in getattr(module, "peft_config", {}):
            continue
        found = get_peft_model_state_dict(module, adapter_name=adapter_name)
        for key, weight in found.items():
            weights[prefix + key.removeprefix("text_model.")] = weight.detach()
    return weights
