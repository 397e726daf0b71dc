"""Loads adapters into pipelines, from a folder or the Hub, without training dependencies.

LoRA layers are injected with peft's functional interface instead of diffusers' loaders: diffusers'
loader for text encoders advances the random state, and its loader for U-Nets deactivates other
adapters. Soft tokens are loaded by diffusers as textual inversions. `PromptEncoder` puts them
before every prompt, and finds the words that switch an adapter off.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffusers_fair.adapters.folder import Adapter
from diffusers_fair.adapters.format import AdapterInfo, Lora
from diffusers_fair.adapters.layers import (
    adapter_layers,
    check_projections,
    is_fused_into,
    lora_layers,
    lora_models,
)
from diffusers_fair.adapters.prefix import LoadedPrefix
from diffusers_fair.adapters.prompt_encoder import (
    ensure_prompt_encoder,
    prompt_encoder,
    prompt_prefix,
)
from diffusers_fair.adapters.repository import REPOSITORY, open_fair_adapter
from diffusers_fair.adapters.soft_tokens import (
    check_embeddings,
    check_soft_tokens,
    load_soft_tokens,
    unload_soft_tokens,
)
from diffusers_fair.adapters.tensors import Weights
from diffusers_fair.adapters.word_switch import WordSwitch, adapter_words, check_not_compiled
from diffusers_fair.families import LORA_PREFIXES, family_of, module_prefix
from diffusers_fair.families.fingerprint import base_fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MIRRORS = {  # Hub id -> current id of the same model
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-legacy/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


def load_fair_adapter(
    pipe: "DiffusionPipeline",
    id_or_dir: str | Path | Adapter,
    *,
    scale: float = 1.0,
    adapter_name: str = "fair",
    revision: str | None = None,
    token: str | bool | None = None,
    other_base: bool = False,
    respect_words: bool = False,
) -> None:
    """Load a fairness adapter into a pipeline; also available as `pipe.load_fair_adapter(...)`.

    Adapters that the pipeline already has stay active. If anything fails, the pipeline is restored.

    Soft tokens are put before every text prompt, but not before the negative prompt. A pipeline
    that is made from this one's components knows the tokens, but does not insert them: type the
    placeholder yourself, as in `<fair> a chef`.

    Args:
        pipe: a pipeline with the base model that the adapter was trained for.
        id_or_dir: an adapter folder, the id of a Hub repository (which may be in the local cache),
            or an adapter from `open_fair_adapter`.
        scale: strength; 0 is the base model, 1 the adapter as trained. With soft tokens, only 0 and
            1 are possible.
        adapter_name: name of the adapter in the pipeline, also for diffusers' `set_adapters`.
        revision: branch, tag or commit of the repository.
        token: access token for a private repository.
        other_base: whether to accept a base model that the adapter was not trained for, such as a
            fine-tuned one, if the layers fit. Its effect there has not been measured.
        respect_words: whether to switch the adapter off for prompts that name a class of a balanced
            attribute, as in "a female chef"; other prompts of the same batch still use it. The
            words are listed in `fair_adapter.json`. They match anywhere in the prompt and in any
            case, so an adapter that balances an attribute with the word "white" is also off for "a
            doctor in a white coat". Prompts must then be text, not `prompt_embeds`. Words of the
            negative prompt are ignored. A pipeline that is made from this one's components does not
            search its prompts for words.

    Raises:
        ValueError: the adapter is not found, damaged, of another format version or for another base
            model; the name is in use; the scale is invalid; adapters are fused into the weights;
            another adapter has soft tokens; the weights are offloaded layer by layer; or the
            pipeline's prompts cannot be searched for words.
    """
    if not re.fullmatch(r"[\w-]+", adapter_name):
        raise ValueError(
            f"adapter_name must be letters, digits, '_' and '-' only, got '{adapter_name}'"
        )
    if is_fused_into(pipe, adapter_name):
        raise ValueError(
            f"an adapter '{adapter_name}' is fused into the pipeline's weights: pass another "
            "adapter_name"
        )
    if adapter_name in _adapter_names(pipe):
        raise ValueError(
            f"the pipeline already has an adapter '{adapter_name}': unload it first or pass "
            "another adapter_name"
        )
    _check_scale(scale)
    _check_not_fused(pipe)
    _check_takes_effect(pipe)
    _check_in_memory(pipe)
    adapter = open_fair_adapter(id_or_dir, revision, token)
    info, weights = adapter.info, adapter.weights
    _check_prefix_scale(scale, info.soft_tokens is not None)
    _check_parts(pipe, info, needs_base=not other_base)
    if not other_base:
        _check_base(pipe, info)
    _check_fit(pipe, info, weights)
    if respect_words:
        _check_words(pipe)
    try:
        if info.soft_tokens:
            load_soft_tokens(pipe, info.soft_tokens, weights, adapter_name, info.lora)
        for part, lora in info.lora.items():
            model = lora_models(pipe)[part]
            _insert(model, lora, _state(weights, part, model), adapter_name)
        if respect_words:
            switch = WordSwitch(adapter_name, adapter_words(info), family_of(pipe))
            ensure_prompt_encoder(pipe).switches[adapter_name] = switch
            switch.attach(pipe)
        set_fair_adapter_scale(pipe, scale, adapter_name=adapter_name)
    except BaseException:
        _remove(pipe, adapter_name)
        raise


def unload_fair_adapter(pipe: "DiffusionPipeline", *, adapter_name: str = "fair") -> None:
    """Remove an adapter; the pipeline is then bit for bit what it was without it.

    Raises:
        ValueError: the pipeline has no such adapter, adapters are fused into its weights, or
            the weights are offloaded layer by layer.
    """
    _check_loaded(pipe, adapter_name)
    _check_not_fused(pipe, adapter_name)
    _check_in_memory(pipe)
    _remove(pipe, adapter_name)


def set_fair_adapter_scale(
    pipe: "DiffusionPipeline", scale: float, *, adapter_name: str = "fair"
) -> None:
    """Set an adapter's strength: 0 is the base model, 1 the adapter as trained.

    A scale other than 0 also activates an adapter that diffusers has deactivated, as `set_adapters`
    or loading another LoRA does; other adapters stay as they are.

    Raises:
        ValueError: the pipeline has no such adapter, or a part of it was removed; the scale is not
            finite, or it is neither 0 nor 1 for an adapter with soft tokens; adapters are fused
            into the weights; or LoRA layers are disabled.
    """
    _check_scale(scale)
    _check_loaded(pipe, adapter_name)
    prefix = _prefix(pipe, adapter_name)
    _check_prefix_scale(scale, prefix is not None)
    _check_not_fused(pipe, adapter_name)
    _check_complete(pipe, adapter_name)
    if scale:
        _check_takes_effect(pipe)
    for part, layers in adapter_layers(pipe, adapter_name).items():
        for layer in layers:
            layer.set_scale(adapter_name, scale)
        if scale:
            _activate(lora_models(pipe)[part], adapter_name)
    if prefix is not None:
        prefix.is_enabled = bool(scale)


# ---- checks --------------------------------------------------------------------------------------


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")


def _check_prefix_scale(scale: float, has_prefix: bool) -> None:
    """Refuse scales other than 0 and 1: scaled soft tokens do not weaken the adapter."""
    if has_prefix and scale not in (0, 1):
        raise ValueError(
            f"this adapter has soft tokens, which cannot be scaled: scale must be 0 or 1, "
            f"got {scale}"
        )


def _check_loaded(pipe: "DiffusionPipeline", adapter_name: str) -> None:
    if adapter_name not in _adapter_names(pipe):
        raise ValueError(
            f"the pipeline has no adapter '{adapter_name}', only {sorted(_adapter_names(pipe))}"
        )


def _check_not_fused(pipe: "DiffusionPipeline", adapter_name: str | None = None) -> None:
    """Refuse fused adapters: peft would unfuse them, which rounds the base model's weights."""
    models = lora_models(pipe).values()
    if any(layer.merged for model in models for layer in lora_layers(model).values()):
        raise ValueError(
            "adapters are fused into the pipeline's weights: call pipe.unfuse_lora() first"
        )
    if adapter_name is not None and is_fused_into(pipe, adapter_name):
        raise ValueError(
            f"the adapter '{adapter_name}' is fused into the pipeline's weights, and its layers, "
            "by which it could be unfused, were removed: load the base model again"
        )


def _check_complete(pipe: "DiffusionPipeline", adapter_name: str) -> None:
    """Refuse an adapter of which diffusers' own methods have removed a part."""
    prefix = _prefix(pipe, adapter_name)
    if prefix is not None:
        prefix.check_complete()
    elif not adapter_layers(pipe, adapter_name):  # only its word switch is left
        raise ValueError(
            f"the layers of the adapter '{adapter_name}' were removed from the pipeline: call "
            "unload_fair_adapter, and load the adapter again"
        )


def _check_takes_effect(pipe: "DiffusionPipeline") -> None:
    """Refuse a pipeline whose LoRA layers have no effect, whatever their scale."""
    models = lora_models(pipe).values()
    if any(layer.disable_adapters for model in models for layer in lora_layers(model).values()):
        raise ValueError("the pipeline's LoRA layers are disabled: call pipe.enable_lora() first")
    check_projections(pipe)


def _check_in_memory(pipe: "DiffusionPipeline") -> None:
    """Refuse offloaded weights: added LoRA layers would be offloaded as well, and lost."""
    if any(weight.is_meta for model in lora_models(pipe).values() for weight in model.parameters()):
        raise ValueError(
            "the pipeline's weights are offloaded layer by layer: call pipe.remove_all_hooks() "
            "first, and pipe.enable_sequential_cpu_offload() again afterwards"
        )


def _check_parts(pipe: "DiffusionPipeline", info: AdapterInfo, needs_base: bool) -> None:
    """Check that the pipeline has the components that the adapter or its fingerprint needs."""
    family = family_of(pipe)
    targets = {*family.targets} if needs_base else {*info.lora}
    if info.soft_tokens:
        targets |= {*family.embedding_keys}
    if needs_base or info.soft_tokens:
        targets |= {family.inversions[name] for name in targets if name in family.inversions}
    if missing := sorted(name for name in targets if getattr(pipe, name, None) is None):
        raise ValueError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}, which the adapter "
            "needs: load the base model with all its components"
        )


def _check_base(pipe: "DiffusionPipeline", info: AdapterInfo) -> None:
    """Check that the pipeline is the adapter's base, by Hub id if both have one, and by shapes."""
    mismatch = None
    if base_fingerprint(pipe) != info.fingerprint:
        mismatch = f"the layers of this {family_of(pipe).kind(pipe)} have other shapes"
    ids = [MIRRORS.get(name, name) for name in (info.base_model, pipe.name_or_path or "")]
    if all(map(REPOSITORY.fullmatch, ids)) and not Path(ids[1]).is_dir() and ids[0] != ids[1]:
        mismatch = f"this pipeline is '{ids[1]}'"
    if mismatch:
        raise ValueError(
            f"the adapter was trained for the base model '{info.base_model}', but {mismatch}: pass "
            "other_base=True to load it anyway if its layers fit"
        )


def _check_words(pipe: "DiffusionPipeline") -> None:
    """Check that the calls of the pipeline's models can be told apart by their prompts."""
    family = family_of(pipe)
    if not family.evaluates_prompts_together:
        raise ValueError(
            f"respect_words is not available for {family.name}, whose pipeline evaluates prompts "
            "and negative prompts apart: load the adapter without respect_words"
        )
    method = family.encode_method
    if not hasattr(type(pipe), method):
        raise ValueError(
            f"respect_words needs a pipeline with {method}, which {type(pipe).__name__} lacks"
        )
    check_not_compiled(pipe)


def _check_fit(pipe: "DiffusionPipeline", info: AdapterInfo, weights: Weights) -> None:
    """Check that every weight fits a layer, and that soft tokens fit the text encoder."""
    if info.soft_tokens:
        check_soft_tokens(pipe, info.soft_tokens)
        check_embeddings(pipe, info.soft_tokens, weights)
    for part in info.lora:
        model = lora_models(pipe)[part]
        modules = dict(model.named_modules())
        for key, tensor in _state(weights, part, model).items():
            name, _, half = key.removesuffix(".weight").rpartition(".lora_")
            layer = modules.get(name)
            base = getattr(layer, "base_layer", layer)  # if another adapter wraps it
            # A is (rank, in), B is (out, rank); the weight may be packed in 4 bits
            axis, size = (1, "in_features") if half == "A" else (0, "out_features")
            if not isinstance(base, nn.Linear) or tensor.shape[axis] != getattr(base, size):
                raise ValueError(f"the adapter's weight '{key}' fits no layer of the {part}")


def _state(weights: Weights, part: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights of one component under peft's names: `module.lora_A.weight`."""
    prefix = LORA_PREFIXES[part]
    level = module_prefix(model, prefix)
    return {
        level + key.removeprefix(prefix): value
        for key, value in weights.items()
        if key.startswith(prefix)
    }


def _in_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to float32, as in training; half precision only saves space in files."""
    return {key: value.float() for key, value in state.items()}


# ---- adding and removing layers ------------------------------------------------------------------


def _adapter_names(pipe: "DiffusionPipeline") -> set[str]:
    """Names of all adapters in the pipeline, including those that diffusers loaded."""
    names = {
        name for model in lora_models(pipe).values() for name in getattr(model, "peft_config", {})
    }
    encoder = prompt_encoder(pipe)
    return names if encoder is None else names | encoder.adapter_names


def _prefix(pipe: "DiffusionPipeline", adapter_name: str) -> LoadedPrefix | None:
    """The prefix before the prompts, if it belongs to this adapter."""
    prefix = prompt_prefix(pipe)
    if isinstance(prefix, LoadedPrefix) and prefix.adapter_name == adapter_name:
        return prefix
    return None


def _active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return next((list(layer.active_adapters) for layer in lora_layers(model).values()), [])


@contextmanager
def _preserve_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore every parameter's `requires_grad`, which peft changes."""
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in kept:
            parameter.requires_grad_(flag)


def _activate(model: nn.Module, adapter_name: str) -> None:
    """Make an adapter take part in the forward pass, beside those that do."""
    from peft.functional import set_adapter

    active = _active_adapters(model)
    if adapter_name not in active:
        with _preserve_requires_grad(model):
            set_adapter(model, [*active, adapter_name], inference_mode=True)


def _insert(model: Any, lora: Lora, state: dict[str, Tensor], adapter_name: str) -> None:
    """Add frozen LoRA layers, and keep the model's active adapters active."""
    from peft import LoraConfig
    from peft.functional import inject_adapter_in_model, set_adapter, set_peft_model_state_dict

    active = _active_adapters(model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft accepts floats
        target_modules=sorted({key.rpartition(".lora_")[0] for key in state}),
    )
    with _preserve_requires_grad(model):
        try:
            inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)
            set_peft_model_state_dict(
                model, _in_float32(state), adapter_name, low_cpu_mem_usage=True
            )
        finally:
            set_adapter(model, [*active, adapter_name], inference_mode=True)
    model._hf_peft_config_loaded = True  # the models' own adapter methods check it


def _remove(pipe: "DiffusionPipeline", adapter_name: str) -> None:
    """Remove an adapter, even if it is only partly loaded."""
    from peft.functional import set_adapter

    prefix = _prefix(pipe, adapter_name)
    if encoder := prompt_encoder(pipe):
        encoder.drop(adapter_name)
    if prefix is not None:
        unload_soft_tokens(pipe, prefix.tokens)

    for model in lora_models(pipe).values():
        active = [name for name in _active_adapters(model) if name != adapter_name]
        with _preserve_requires_grad(model):
            set_adapter(model, active, inference_mode=True)
            for name, layer in lora_layers(model).items():
                layer.delete_adapter(adapter_name)
                if not layer.scaling:  # no other adapter uses it
                    model.set_submodule(name, layer.get_base_layer())
        if getattr(model, "peft_config", {}).pop(adapter_name, None) and not model.peft_config:
            del model.peft_config
            model._hf_peft_config_loaded = False
