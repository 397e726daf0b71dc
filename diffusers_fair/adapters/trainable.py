"""An adapter in training: all its parts, low-rank layers and soft tokens alike, as one thing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.adapters.format import SOFT_TOKENS, Lora, SoftTokens
from diffusers_fair.adapters.lora import TARGETS, add_lora, lora_tensors, without_adapter
from diffusers_fair.adapters.prompt_encoder import without_prefix
from diffusers_fair.adapters.soft_tokens import add_soft_tokens, soft_tokens
from diffusers_fair.adapters.tensors import Weights


class TrainableAdapter:
    """Freezes a pipeline and puts an adapter into it, the only thing in it that can be trained.

    Low-rank layers change nothing yet; soft tokens start from rows of the vocabulary, and stand
    before every prompt that the pipeline encodes from then on.

    Args:
        pipe: a Stable Diffusion pipeline.
        components: what the adapter is made of, as in `AdapterInfo`.
        seed: of the initial values.

    Raises:
        ValueError: no component, an unknown one, or one that the pipeline cannot have.
    """

    def __init__(self, pipe: Any, components: Mapping[str, Lora | SoftTokens], seed: int = 0):
        _check_components(components)
        self.pipe = pipe
        self.components = dict(components)
        self.parts: dict[str, list[nn.Parameter]] = {}
        """Component -> its parameters, in float32 or better whatever the pipeline is in."""
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False)
        for name, component in components.items():
            self.parts[name] = _add(pipe, name, component, seed)
        for parameter in self.parameters:  # a component freezes those that came before it
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all components, one after the other."""
        return [parameter for part in self.parts.values() for parameter in part]

    def weights(self) -> Weights:
        """Copy the weights out, on the CPU: what `write_adapter` takes."""
        return {
            key: tensor.to("cpu", copy=True).contiguous() for key, tensor in self._tensors().items()
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a saved adapter.

        Args:
            weights: as `read_adapter` gives them.

        Raises:
            ValueError: they are those of other components or of other sizes; nothing has changed.
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
    def off(self) -> Iterator[None]:
        """Switch the adapter off: the original model, for the time being."""
        with without_adapter(self.pipe), without_prefix(self.pipe):
            yield

    def _tensors(self) -> Weights:
        """The parameters by the names they are saved under; to write into, not to train."""
        tensors = lora_tensors(self.pipe)
        soft = self.components.get(SOFT_TOKENS)
        if isinstance(soft, SoftTokens):
            tensors[soft.token] = soft_tokens(self.pipe.text_encoder).detach()  # (m, d)
        return tensors


def _check_components(components: Mapping[str, Lora | SoftTokens]) -> None:
    kinds = {**dict.fromkeys(TARGETS, Lora), SOFT_TOKENS: SoftTokens}
    fitting = [isinstance(size, kinds.get(name, ())) for name, size in components.items()]
    if not fitting or not all(fitting):
        raise ValueError(
            f"an adapter is made of Lora for {list(TARGETS)} and SoftTokens for '{SOFT_TOKENS}', "
            f"got {dict(components)}"
        )


def _add(pipe: Any, name: str, component: Lora | SoftTokens, seed: int) -> list[nn.Parameter]:
    """Put one component into the pipeline; return its parameters."""
    if isinstance(component, Lora):
        return add_lora(pipe, name, component.rank, alpha=component.alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return [add_soft_tokens(pipe, component.count, generator, token=component.token)]


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"of shape {list(tensor.shape)}"
