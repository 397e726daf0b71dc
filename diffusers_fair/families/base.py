"""The interface of a pipeline family, through which the rest of the package uses pipelines.

A family is a set of diffusers pipelines with the same components and calling conventions. It has no
state: its methods take the pipeline as an argument.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_fair.families.conditioning import Conditioning

Denoise = Callable[..., Any]
"""A denoiser, or its `forward` to bypass hooks."""


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes.

    With `enable_model_cpu_offload`, this is the GPU, while `pipe.device` is the CPU.
    """
    return torch.device(getattr(pipe, "_execution_device", pipe.device))


class Family(Protocol):
    """A family of pipelines, such as Stable Diffusion 1 and 2."""

    name: str
    """Name in error messages."""
    denoiser: str
    """Component that is evaluated at every step."""
    components: tuple[str, ...]
    """Components that hold weights."""
    targets: Mapping[str, tuple[str, ...]]
    """Component that diffusers can load LoRA weights into -> its layers that get LoRA."""
    lora_prefixes: Mapping[str, str]
    """Component that can have LoRA layers -> prefix of its keys in the weights file."""
    inversions: Mapping[str, str]
    """Text encoder that can have soft tokens -> its tokenizer."""
    encode_method: str
    """Method of the pipeline that encodes prompts; adapters wrap it on the instance."""
    guidance_scale: float
    """Usual guidance scale."""
    steps: int
    """Usual number of scheduler steps."""

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline belongs to this family."""

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts differentiably; prompts that are too long are truncated.

        Args:
            pipe: a pipeline of this family.
            prompts: n prompts.
            prefix: whether an adapter's soft tokens precede the prompts. False for negative
                prompts and the empty prompt of guidance.

        Returns:
            Tensors with n rows.
        """

    def unconditional(self, pipe: Any) -> Conditioning:
        """Return the conditioning of the unconditional guidance branch, one row."""

    def noise_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of one image's latents."""

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the denoiser.

        Args:
            denoiser: the pipeline's denoiser.
            latents: (m, c, h, w), scaled by the scheduler.
            timesteps: () or (m,).
            conditioning: tensors with m rows.

        Returns:
            (m, c, h, w).
        """

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a denoiser call."""

    def guidance_branches(self, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight in the guided prediction.

        Raises:
            ValueError: a scale that this family cannot use.
        """

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the predictions of `guidance_branches`, in their order, (n, c, h, w) each."""

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling of the latents: what the VAE decodes."""
