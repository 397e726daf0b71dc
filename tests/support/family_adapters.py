"""Adapters of every family that do something, shared by tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from families import PIPELINES, size_of
from test_io import adapter_info

from diffusers_fair.adapters.folder import write_adapter
from diffusers_fair.adapters.format import Lora, SoftTokens
from diffusers_fair.adapters.trainable import TrainableAdapter
from diffusers_fair.families import family_of
from diffusers_fair.families.fingerprint import base_fingerprint

SOFT = {"soft_tokens": SoftTokens(count=2)}


def layers(pipe: Any) -> dict[str, Lora]:
    """LoRA layers of all components that can have them; alpha is not the rank."""
    return {name: Lora(rank=2, alpha=6.0) for name in family_of(pipe).targets}


def everything(pipe: Any) -> dict[str, Lora | SoftTokens]:
    """All components that an adapter of this family can have."""
    return layers(pipe) | (SOFT if family_of(pipe).embedding_keys else {})


def trained(
    pipe: Any, components: Mapping[str, Lora | SoftTokens], *, seed: int = 0, size: float = 0.2
) -> TrainableAdapter:
    """Add an adapter with random weights to a pipeline."""
    adapter = TrainableAdapter(pipe, components)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters:
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return adapter


def saved(
    folder: Path, name: str, components: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Write the folder of such an adapter of a family; return the pipeline it was trained in."""
    pipe = PIPELINES[name]()
    info = {"words": options.pop("words", {}), "evaluation": None}
    components = everything(pipe) if components is None else components
    adapter = trained(pipe, components, **options)
    info |= {"fingerprint": base_fingerprint(pipe), "components": components}
    write_adapter(folder, adapter.weights(), adapter_info(**info))
    return pipe


def draw(pipe: Any, prompt: str | list[str] = "a chef", **more: Any) -> torch.Tensor:
    """Images (n, 3, 16, 16), each from noise of its own, at the usual guidance scale."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    family = family_of(pipe)
    call = family.call_options(pipe, family.usual(pipe).guidance_scale, size_of(pipe)) | more
    call = {"num_inference_steps": 2, "generator": generators, "output_type": "pt"} | call
    return pipe(prompt=prompt, **call).images
