"""LoRA layers in training: adding, disabling and exporting them in diffusers' layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.families import family_of, module_prefix


def add_lora(
    pipe: Any,
    component: str,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    adapter_name: str = "fair",
) -> list[nn.Parameter]:
    """Freeze a component of a pipeline and add trainable LoRA layers, which initially do nothing.

    Args:
        pipe: a pipeline of a known family.
        component: one of the family's `targets`.
        rank: rank of the LoRA matrices.
        alpha: the product of the matrices is scaled by alpha / rank; default: the rank.
        seed: random seed of the initial values.
        adapter_name: name of the adapter in peft.

    Returns:
        The adapter's parameters, in float32 or better regardless of the component's dtype.

    Raises:
        ValueError: an unknown component, or one that has an adapter of this name already.
    """
    from peft import LoraConfig

    family = family_of(pipe)
    targets = family.targets
    if component not in targets:
        raise ValueError(f"LoRA goes into one of {sorted(targets)}, got {component!r}")
    module = getattr(pipe, component)
    if adapter_name in getattr(module, "peft_config", {}):
        raise ValueError(
            f"the {component} has an adapter '{adapter_name}' already: "
            "unload it first, or choose another adapter_name"
        )
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft initializes on the CPU
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,  # type: ignore[arg-type]  # peft accepts floats
            target_modules=[
                name
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear)
                and name.endswith(tuple(f".{target}" for target in targets[component]))
                and family.has_effect(component, module, name)
            ],
        )
        module.add_adapter(config, adapter_name=adapter_name)
    parameters = _trainable_parameters(module)
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def _trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def without_adapter(pipe: Any) -> Iterator[None]:
    """Disable all LoRA layers of the pipeline within a `with` block."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [  # peft does not type them as modules
        layer
        for component in family_of(pipe).targets
        for layer in getattr(pipe, component).modules()
        if isinstance(layer, LoraLayer)
    ]
    trained = [parameter for layer in layers for parameter in _trainable_parameters(layer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:  # enable_adapters(False) froze them
            parameter.requires_grad_(True)


def lora_tensors(pipe: Any, *, adapter_name: str = "fair") -> dict[str, Tensor]:
    """Return the adapter's tensors from all components of the pipeline.

    Returns:
        Tensors with keys in diffusers' layout, which `pipe.load_lora_weights` reads in any version.
        Empty if no component has the adapter.
    """
    from peft import get_peft_model_state_dict

    weights = {}
    for component, prefix in family_of(pipe).lora_prefixes.items():
        module = getattr(pipe, component)
        if adapter_name not in getattr(module, "peft_config", {}):
            continue
        state = get_peft_model_state_dict(module, adapter_name=adapter_name)
        level = module_prefix(module, prefix)
        for key, weight in state.items():
            weights[prefix + key.removeprefix(level)] = weight.detach()
    return weights
