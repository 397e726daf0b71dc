"""An adapter in training: LoRA layers and soft tokens behind one interface."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.adapters.format import SOFT_TOKENS, Lora, SoftTokens
from diffusers_fair.adapters.lora import add_lora, lora_tensors, without_adapter
from diffusers_fair.adapters.prompt_encoder import without_prefix
from diffusers_fair.adapters.soft_tokens import add_soft_tokens, soft_tokens
from diffusers_fair.adapters.tensors import Weights
from diffusers_fair.families import family_of
from diffusers_fair.families.base import Family


class TrainableAdapter:
    """A trainable adapter in a frozen pipeline.

    LoRA layers initially do nothing. Soft tokens are initialized with random rows of the
    vocabulary, and precede every prompt that the pipeline encodes from then on.

    Args:
        pipe: a pipeline of a known family; all its weights are frozen.
        components: components of the adapter, as in `AdapterInfo`.
        seed: random seed of the initial values.

    Raises:
        ValueError: no component, an unknown one, or one that does not fit the pipeline.
    """

    def __init__(self, pipe: Any, components: Mapping[str, Lora | SoftTokens], seed: int = 0):
        _check_components(components, family_of(pipe))
        self.pipe = pipe
        self.components = dict(components)
        self.parts: dict[str, list[nn.Parameter]] = {}
        """Component -> its parameters, in float32 or better regardless of the pipeline's dtype."""
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
        for name, component in components.items():
            self.parts[name] = _add(pipe, name, component, seed)
        for parameter in self.parameters:  # adding a component froze the earlier ones
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of all components, in the order of the components."""
        return [parameter for part in self.parts.values() for parameter in part]

    def weights(self) -> Weights:
        """Copy the weights to the CPU, for `write_adapter`."""
        return {
            key: tensor.to("cpu", copy=True).contiguous() for key, tensor in self._tensors().items()
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a saved adapter.

        Args:
            weights: as `read_adapter` returns them.

        Raises:
            ValueError: weights of other components or other sizes; in that case nothing changes.
        """
        tensors = self._tensors()
        for key in sorted(tensors.keys() | weights.keys()):
            expected, got = (_shape(group.get(key)) for group in (tensors, weights))
            if expected != got:
                raise ValueError(
                    f"the weights are not those of an adapter of {self.components}: expected "
                    f"'{key[:200]}' to be {expected}, got {got}: train with the components of the "
                    "adapter to continue from"
                )
        for key, tensor in tensors.items():
            tensor.copy_(weights[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapter within a `with` block, which restores the original model."""
        with without_adapter(self.pipe), without_prefix(self.pipe):
            yield

    def _tensors(self) -> Weights:
        """Name in the adapter folder -> detached parameter."""
        tensors = lora_tensors(self.pipe)
        soft = self.components.get(SOFT_TOKENS)
        if isinstance(soft, SoftTokens):
            for key, tokens in soft_tokens(self.pipe, soft.token).items():
                tensors[key] = tokens.detach()  # (m, d)
        return tensors


def _check_components(components: Mapping[str, Lora | SoftTokens], family: Family) -> None:
    check_component_names(components, family)
    kinds = {**dict.fromkeys(family.targets, Lora), SOFT_TOKENS: SoftTokens}
    fitting = [isinstance(size, kinds[name]) for name, size in components.items()]
    if not fitting or not all(fitting):
        raise ValueError(
            f"an adapter is made of Lora for {[*family.targets]} and SoftTokens for "
            f"'{SOFT_TOKENS}', got {dict(components)}"
        )


def check_component_names(names: Iterable[str], family: Family) -> None:
    """Refuse components that adapters of a family cannot have.

    Args:
        names: components of an adapter.
        family: family of its base model.

    Raises:
        ValueError: a component that the family lacks.
    """
    possible = [*family.targets, *[SOFT_TOKENS] * bool(family.embedding_keys)]
    if lacking := [name for name in names if name not in possible]:
        raise ValueError(
            f"adapter.components: an adapter for {family.name} can have {', '.join(possible)}, "
            f"got {', '.join(lacking)}: choose among those"
        )


def _add(pipe: Any, name: str, component: Lora | SoftTokens, seed: int) -> list[nn.Parameter]:
    """Add a component to the pipeline, and return its parameters."""
    if isinstance(component, Lora):
        return add_lora(pipe, name, component.rank, alpha=component.alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = add_soft_tokens(pipe, component.count, generator, token=component.token)
    return [*tokens.values()]


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"of shape {list(tensor.shape)}"
