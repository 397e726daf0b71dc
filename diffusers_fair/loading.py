"""Adapter folder or Hub repository -> pipeline. Light: nothing of training is imported here.

The low-rank layers are put in with peft's functional interface, the same for every part: the host's
loader for text encoders draws random numbers, and the one for U-Nets switches other adapters off.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffusers_fair.adapters.io import (
    INFO_FILE,
    PREFIXES,
    WEIGHTS_FILE,
    AdapterInfo,
    Lora,
    Weights,
    base_fingerprint,
    read_adapter,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft.tuners.lora import LoraLayer


def load_fair_adapter(
    pipe: "DiffusionPipeline",
    id_or_dir: str | Path,
    *,
    scale: float = 1.0,
    adapter_name: str = "fair",
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Put a fairness adapter on a pipeline; also `pipe.load_fair_adapter(...)`.

    Adapters that the pipeline already carries stay, and stay active. Upon any error the pipeline is
    as it was.

    Args:
        pipe: a pipeline with the base model that the adapter was trained for.
        id_or_dir: an adapter folder, or a repository on the Hub (then also from the local cache).
        scale: strength; 0 is the base model, 1 the adapter as trained.
        adapter_name: to address it by, also in diffusers' own `set_adapters`.
        revision: branch, tag or commit of the repository.
        token: for a private repository.

    Raises:
        ValueError: one sentence: not found, damaged, another format version, another base model, a
            name in use, other adapters fused into the weights.
    """
    if not re.fullmatch(r"[\w-]+", adapter_name):
        raise ValueError(
            f"adapter_name must be letters, digits, '_' and '-' only, got '{adapter_name}'"
        )
    if adapter_name in _adapter_names(pipe):
        raise ValueError(
            f"the pipeline already carries an adapter '{adapter_name}': unload it first or pass "
            "another adapter_name"
        )
    _check_scale(scale)
    _check_not_fused(pipe)
    info, weights = read_adapter(local_folder(id_or_dir, revision, token))
    _check_base(pipe, info, weights)
    try:
        for part, lora in info.components.items():
            _insert(getattr(pipe, part), lora, _state(weights, part), adapter_name)
        set_fair_adapter_scale(pipe, scale, adapter_name=adapter_name)
    except BaseException:
        _remove(pipe, adapter_name)
        raise


def unload_fair_adapter(pipe: "DiffusionPipeline", *, adapter_name: str = "fair") -> None:
    """Take an adapter off again: the pipeline is bit for bit what it was without it.

    Raises:
        ValueError: the pipeline carries no such adapter, or adapters are fused into its weights.
    """
    _loaded_layers(pipe, adapter_name)
    _check_not_fused(pipe)
    _remove(pipe, adapter_name)


def set_fair_adapter_scale(
    pipe: "DiffusionPipeline", scale: float, *, adapter_name: str = "fair"
) -> None:
    """Set an adapter's strength: 0 is the base model, 1 the adapter as trained.

    Raises:
        ValueError: the pipeline carries no such adapter, or the scale is not finite.
    """
    _check_scale(scale)
    for layer in _loaded_layers(pipe, adapter_name):
        layer.set_scale(adapter_name, scale)


# ---- where the folder is -------------------------------------------------------------------------


def local_folder(
    id_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder itself, or the cached copy of a repository's two files that are read."""
    if Path(id_or_dir).is_dir():
        return Path(id_or_dir)
    repository = str(id_or_dir)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise ValueError(f"there is no adapter folder at '{id_or_dir}'")

    from huggingface_hub import errors, snapshot_download

    try:
        files = [INFO_FILE, WEIGHTS_FILE]
        return Path(
            snapshot_download(repository, revision=revision, token=token, allow_patterns=files)
        )
    except errors.RepositoryNotFoundError:
        reason = "no repository on the Hub that you may read (if it is private, pass token=)"
    except errors.RevisionNotFoundError:
        reason = f"its repository on the Hub has no revision '{revision}'"
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the local cache, and the Hub cannot be reached"
    except OSError as error:
        reason = f"the Hub answered with an error ({type(error).__name__})"
    raise ValueError(f"there is no adapter folder at '{repository}', and {reason}")


# ---- what is checked -----------------------------------------------------------------------------


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")


def _check_not_fused(pipe: "DiffusionPipeline") -> None:
    """Fused layers would be unfused on the way, which rounds the base model's weights."""
    if any(layer.merged for model in _parts(pipe).values() for layer in _layers(model).values()):
        raise ValueError(
            "adapters are fused into the pipeline's weights: call pipe.unfuse_lora() first"
        )


def _check_base(pipe: "DiffusionPipeline", info: AdapterInfo, weights: Weights) -> None:
    """The pipeline's shapes are those of the adapter's base, and every weight has its layer."""
    if base_fingerprint(pipe) != info.fingerprint:
        raise ValueError(
            f"the adapter was trained for the base model '{info.base_model}', and the shapes of "
            f"this {type(pipe).__name__}'s text encoder and U-Net are of another one"
        )
    for part in info.components:
        modules = dict(_parts(pipe)[part].named_modules()) if part in _parts(pipe) else {}
        for key, tensor in _state(weights, part).items():
            name, _, half = key.removesuffix(".weight").rpartition(".lora_")
            layer = modules.get(name)
            base = getattr(layer, "base_layer", layer)  # below an adapter already there
            axis = 1 if half == "A" else 0  # A is (rank, in), B is (out, rank); the base (out, in)
            if not isinstance(base, nn.Linear) or tensor.shape[axis] != base.weight.shape[axis]:
                raise ValueError(f"the adapter's weight '{key}' fits no layer of the {part}")


def _state(weights: Weights, part: str) -> dict[str, Tensor]:
    """The weights of one part by peft's names: `module.lora_A.weight`."""
    prefix = PREFIXES[part]
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


# ---- layers in and out ---------------------------------------------------------------------------


def _parts(pipe: "DiffusionPipeline") -> dict[str, Any]:
    """The pipeline's models that may carry low-rank layers."""
    return {part: model for part in PREFIXES if (model := getattr(pipe, part, None)) is not None}


def _adapter_names(pipe: "DiffusionPipeline") -> set[str]:
    """Names of all adapters on the pipeline, whoever loaded them."""
    return {name for model in _parts(pipe).values() for name in getattr(model, "peft_config", {})}


def _layers(model: nn.Module) -> "dict[str, LoraLayer]":
    """Module name -> low-rank layer, of whichever adapter."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _loaded_layers(pipe: "DiffusionPipeline", adapter_name: str) -> "list[LoraLayer]":
    """The layers that hold weights of this adapter; there are some."""
    layers = [
        layer
        for model in _parts(pipe).values()
        for layer in _layers(model).values()
        if adapter_name in layer.scaling
    ]
    if not layers:
        raise ValueError(
            f"the pipeline carries no adapter '{adapter_name}', only {sorted(_adapter_names(pipe))}"
        )
    return layers


def _active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return next((list(layer.active_adapters) for layer in _layers(model).values()), [])


@contextmanager
def _trainable_kept(model: nn.Module) -> Iterator[None]:
    """Peft freezes and thaws what it passes by; give every parameter its flag back."""
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in kept:
            parameter.requires_grad_(flag)


def _insert(model: Any, lora: Lora, state: dict[str, Tensor], adapter_name: str) -> None:
    """Add frozen low-rank layers beside the active adapters of the model."""
    from peft import LoraConfig
    from peft.functional import inject_adapter_in_model, set_adapter, set_peft_model_state_dict

    active = _active_adapters(model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, any number will do
        target_modules=sorted({key.rpartition(".lora_")[0] for key in state}),
    )
    with _trainable_kept(model):
        try:
            inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage=True)
            set_peft_model_state_dict(model, state, adapter_name, low_cpu_mem_usage=True)
        finally:
            set_adapter(model, [*active, adapter_name], inference_mode=True)
    model._hf_peft_config_loaded = True  # what the hosts' own adapter methods look at


def _remove(pipe: "DiffusionPipeline", adapter_name: str) -> None:
    """Take out the layers of an adapter, also of one that was put in by half."""
    from peft.functional import set_adapter

    for model in _parts(pipe).values():
        active = [name for name in _active_adapters(model) if name != adapter_name]
        with _trainable_kept(model):
            set_adapter(model, active, inference_mode=True)
            for name, layer in _layers(model).items():
                layer.delete_adapter(adapter_name)
                if not layer.scaling:  # nobody else's weights are in it
                    model.set_submodule(name, layer.get_base_layer())
        if getattr(model, "peft_config", {}).pop(adapter_name, None) and not model.peft_config:
            del model.peft_config
            model._hf_peft_config_loaded = False
