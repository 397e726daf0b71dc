"""LoRA layers in a pipeline, and what its host has made of them: switched off, scaled, fused."""

from typing import TYPE_CHECKING, Any

from torch import nn

from diffusers_fair.families import component, family_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def lora_models(pipe: Any) -> dict[str, Any]:
    """Component name -> model, for the components that can have LoRA layers."""
    models = {name: component(pipe, name) for name in family_of(pipe).targets}
    return {name: model for name, model in models.items() if model is not None}


def lora_layers(model: nn.Module) -> "dict[str, LoraLayer]":
    """Module name -> LoRA layer of any adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def adapter_layers(pipe: Any, adapter_name: str) -> "dict[str, list[LoraLayer]]":
    """Component name -> the layers that hold weights of an adapter, where there are any."""
    found = {
        name: [layer for layer in lora_layers(model).values() if adapter_name in layer.scaling]
        for name, model in lora_models(pipe).items()
    }
    return {name: layers for name, layers in found.items() if layers}


def strengths(pipe: Any, adapter_name: str) -> dict[str, set[float]]:
    """Component name -> factors on the outputs of an adapter's layers: 0 is off, 1 as trained."""
    return {
        name: {_strength(layer, adapter_name) for layer in layers}
        for name, layers in adapter_layers(pipe, adapter_name).items()
    }


def _strength(layer: "LoraLayer", adapter_name: str) -> float:
    # a layer with fused weights adds nothing to them, not even an active adapter
    applied = layer.merged_adapters if layer.merged else layer.active_adapters
    if layer.disable_adapters or adapter_name not in applied:
        return 0.0
    factor = layer.scaling[adapter_name] * layer.r[adapter_name] / layer.lora_alpha[adapter_name]
    return round(factor, 6)  # diffusers multiplies and divides by the scale of a call


def is_fused_into(pipe: Any, adapter_name: str) -> bool:
    """Whether an adapter is fused into the weights, even if its layers were removed since."""
    layers = [x for found in adapter_layers(pipe, adapter_name).values() for x in found]
    if layers:
        return any(adapter_name in layer.merged_adapters for layer in layers)
    return adapter_name in getattr(pipe, "fused_loras", ())


def check_projections(pipe: Any) -> None:
    """Refuse fused attention projections, which are computed without LoRA layers.

    Raises:
        ValueError: `pipe.fuse_qkv_projections()` was called.
    """
    modules = (module for model in lora_models(pipe).values() for module in model.modules())
    processors = (type(getattr(module, "processor", None)).__name__ for module in modules)
    if any(name.startswith("Fused") for name in processors):  # the modules stay when unfused
        raise ValueError(
            "the pipeline's attention projections are fused, so that LoRA layers have no effect: "
            "call pipe.unfuse_qkv_projections() first"
        )


def is_compiled(pipe: Any) -> bool:
    """Whether a model that can have LoRA layers, or a block of it, is compiled."""
    return any(
        getattr(pipe, name) is not model
        or any(module._compiled_call_impl is not None for module in model.modules())
        for name, model in lora_models(pipe).items()
    )
