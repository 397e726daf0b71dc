"""The interface of a pipeline family, through which the rest of the package uses pipelines.

A family is a set of diffusers pipelines with the same components and calling conventions. It has no
state: its methods take the pipeline as an argument.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_fair.families.conditioning import Conditioning

Denoise = Callable[..., Any]
"""A denoiser, or its `forward` to bypass hooks."""
Shape = tuple[int, int, int]
"""(c, h, w) of one image's latents."""

CLIP_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # attention, MLP
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # attention
JOINT_LAYERS = (*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention of a transformer in which image and prompt attend to one another."""


@dataclass(frozen=True)
class Usual:
    """How a model is usually sampled from."""

    guidance_scale: float
    steps: int


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
    latents_argument: str
    """Name of the denoiser's first argument, the latents."""
    components: tuple[str, ...]
    """Components that hold weights."""
    targets: Mapping[str, tuple[str, ...]]
    """Component that diffusers can load LoRA weights into -> its layers that get LoRA."""
    lora_prefixes: Mapping[str, str]
    """Component that can have LoRA layers -> prefix of its keys in the weights file."""
    inversions: Mapping[str, str]
    """Text encoder that can have textual inversions -> its tokenizer."""
    embedding_keys: Mapping[str, str | None]
    """Text encoder that soft tokens are trained for -> key of their tensor in the file; None for
    their placeholder. Empty if the family cannot have soft tokens."""
    pooled: tuple[str, ...]
    """Text encoders whose pooled embedding is read."""
    encode_method: str
    """Method of the pipeline that encodes prompts; adapters wrap it on the instance."""
    has_linear_guidance: bool
    """Whether the guided prediction is the sum of the branches with fixed weights."""
    takes_negative_prompts: bool
    """Whether the pipeline applies `negative_prompt` at its usual guidance scale."""
    evaluates_prompts_together: bool
    """Whether the pipeline encodes its prompts and negative prompts in one call to tensors, and
    evaluates the denoiser for both in one call."""

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline belongs to this family."""

    def kind(self, pipe: Any) -> str:
        """Describe the pipeline in error messages, with what sets it apart in its family."""

    def usual(self, pipe: Any) -> Usual:
        """Return the usual guidance scale and number of scheduler steps."""

    def has_effect(self, component: str, model: nn.Module, layer: str) -> bool:
        """Whether a layer of a component affects images, so that LoRA can be trained in it.

        Args:
            component: one of `targets`.
            model: this component of a pipeline.
            layer: name of the layer in the model.
        """

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

    def complete(
        self, pipe: Any, conditioning: Conditioning, shape: Shape, guidance_scale: float
    ) -> Conditioning:
        """Add what the denoiser takes besides the prompt: image size, embedded guidance scale.

        Args:
            pipe: a pipeline of this family.
            conditioning: as `encode` returns it.
            shape: (c, h, w) of one image's latents.
            guidance_scale: guidance scale of the images.
        """

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents.

        Args:
            pipe: a pipeline of this family.
            size: width and height of the image in pixels; None for the pipeline's default.
        """

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return the arguments of `scheduler.set_timesteps`, as the pipeline's call passes them."""

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the denoiser.

        Args:
            denoiser: the pipeline's denoiser.
            latents: (m, c, h, w), scaled by the scheduler.
            timesteps: () or (m,).
            conditioning: tensors with m rows, as `complete` returns them.

        Returns:
            (m, c, h, w).
        """

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a denoiser call."""

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight in the guided prediction.

        Raises:
            ValueError: a scale that this family cannot use.
        """

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the predictions of `guidance_branches`, in their order, (n, c, h, w) each."""

    def latents_dtype(self, pipe: Any) -> torch.dtype:
        """Return the dtype in which the pipeline keeps the latents between the steps."""

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling and the shift of the latents: what the VAE decodes."""

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode latents (n, c, h, w) to images (n, 3, H, W), not clamped to [-1, 1]."""

    def decoder_dtype(self, pipe: Any) -> torch.dtype:
        """Return the data type in which the pipeline decodes images."""

    def call_options(
        self, pipe: Any, guidance_scale: float, size: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline's call with which it samples as training does.

        Args:
            pipe: a pipeline of this family.
            guidance_scale: guidance scale of the images.
            size: width and height in pixels; None for the pipeline's default.
        """


class ClassifierFreeGuidance:
    """What most families share: two guidance branches, and latents that the VAE scales.

    A scale of at most 1 disables guidance, as in diffusers.
    """

    encode_method = "encode_prompt"
    has_linear_guidance = True
    takes_negative_prompts = True
    evaluates_prompts_together = True
    inversions: Mapping[str, str] = {}
    embedding_keys: Mapping[str, str | None] = {}
    pooled: tuple[str, ...] = ()
    denoiser: str

    def kind(self, pipe: Any) -> str:
        """Return the class of the pipeline."""
        return type(pipe).__name__

    def has_effect(self, component: str, model: nn.Module, layer: str) -> bool:
        """Whether a layer affects images: all of them."""
        return True

    def complete(
        self, pipe: Any, conditioning: Conditioning, shape: Shape, guidance_scale: float
    ) -> Conditioning:
        """Add nothing."""
        return conditioning

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return the number of steps alone."""
        return {"num_inference_steps": steps}

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight in the guided prediction.

        Raises:
            ValueError: a negative scale.
        """
        check_guidance_scale(guidance_scale)
        if guidance_scale <= 1:
            return [("cond", 1.0)]
        return [("uncond", 1 - guidance_scale), ("cond", guidance_scale)]

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the branches in diffusers' order of operations, for the same last bit."""
        if len(predictions) == 1:
            return predictions[0]
        uncond, cond = predictions
        return uncond + guidance_scale * (cond - uncond)

    def latents_dtype(self, pipe: Any) -> torch.dtype:
        """Return the denoiser's dtype."""
        dtype: torch.dtype = getattr(pipe, self.denoiser).dtype
        return dtype

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling of the latents."""
        return latents / pipe.vae.config.scaling_factor

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Decode latents (n, c, h, w) to images (n, 3, H, W), not clamped to [-1, 1]."""
        images: Tensor = pipe.vae.decode(self.vae_input(pipe, latents), return_dict=False)[0]
        return images

    def decoder_dtype(self, pipe: Any) -> torch.dtype:
        """Return the data type of the VAE."""
        return pipe.vae.dtype

    def call_options(
        self, pipe: Any, guidance_scale: float, size: int | None = None
    ) -> dict[str, Any]:
        """Return the guidance scale and the size."""
        return {"guidance_scale": guidance_scale, **square(size)}


class TransformerFamily(ClassifierFreeGuidance):
    """What families share whose adapters are in the transformer alone.

    Their text encoder is a large language model, or one that diffusers loads no LoRA weights into.
    """

    denoiser = "transformer"
    latents_argument = "hidden_states"
    components: tuple[str, ...] = ("transformer", "text_encoder", "vae")
    targets: Mapping[str, tuple[str, ...]] = {"transformer": UNET_LAYERS}
    lora_prefixes: Mapping[str, str] = {"transformer": "transformer."}
    transformer: str
    """Class name of the transformer."""

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has this family's transformer."""
        return component_type(pipe, "transformer") == self.transformer

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a transformer call."""
        embeddings: Tensor = kwargs["encoder_hidden_states"]
        return embeddings

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method."""

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt."""
        return self.encode(pipe, [""], prefix=False)


class Float32Latents(TransformerFamily):
    """Pipelines that keep the latents in float32, whatever the transformer's dtype is."""

    def latents_dtype(self, pipe: Any) -> torch.dtype:
        """Return float32."""
        return torch.float32

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling of the latents, in the dtype of the VAE."""
        return super().vae_input(pipe, latents.to(pipe.vae.dtype))


def check_guidance_scale(guidance_scale: float) -> None:
    """Refuse a negative guidance scale.

    Raises:
        ValueError: it is negative.
    """
    if guidance_scale < 0:
        raise ValueError(
            f"guidance_scale must be at least 0 (0 to 1: no guidance), got {guidance_scale:g}"
        )


def square(size: int | None) -> dict[str, int]:
    """Return the arguments for an image size; none for the default size."""
    return {} if size is None else {"height": size, "width": size}


def side(pipe: Any, size: int | None, multiple: int = 1) -> int:
    """Return the width and height of the latents of an image.

    Args:
        pipe: a pipeline of diffusers.
        size: width and height of the image in pixels; None for the pipeline's default.
        multiple: the latents must be divisible by it.

    Raises:
        ValueError: a size that the pipeline cannot generate.
    """
    if size is None:
        return pipe.default_sample_size
    divisor = pipe.vae_scale_factor * multiple
    if size < divisor or size % divisor:
        raise ValueError(
            f"the image size must be a multiple of {divisor} pixels for this "
            f"{type(pipe).__name__}, got {size}"
        )
    return size // pipe.vae_scale_factor


def encoder_of(pipe: Any, method: str, *, prefix: bool) -> Callable[..., Any]:
    """Return the method that encodes prompts, with or without the prefix of an adapter."""
    # an adapter's prefix wraps the method on the instance; the class has the plain one
    return getattr(pipe, method) if prefix else MethodType(getattr(type(pipe), method), pipe)


def component_type(pipe: Any, name: str) -> str | None:
    """Return the class name of a component, compiled or not; None if there is none."""
    model = getattr(pipe, name, None)
    model = getattr(model, "_orig_mod", model)
    return None if model is None else type(model).__name__


def patches(shape: Shape) -> int:
    """Return the number of 2x2 patches in the latents (c, h, w) of one image."""
    _, h, w = shape
    return (h // 2) * (w // 2)


def resolution_shift(scheduler: Any, tokens: int, *, max_shift: float = 1.15) -> float:
    """Return mu, by which flow-matching schedulers shift their timesteps for large images.

    Args:
        scheduler: its config may have a base and a maximum for length and shift.
        tokens: number of the image's tokens.
        max_shift: default of the maximum shift.
    """
    config = scheduler.config
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (most - least) / (longest - shortest)
    return tokens * slope + (least - slope * shortest)  # diffusers' order, for the same last bit


def normalised(guided: Tensor, prediction: Tensor) -> Tensor:
    """Give each vector along the last axis the norm that it has in the prompt's prediction."""
    expected = torch.norm(prediction, dim=-1, keepdim=True)
    return guided * (expected / torch.norm(guided, dim=-1, keepdim=True))


def module_of(denoiser: Any) -> Any:
    """Return a denoiser, given it or its `forward`."""
    return getattr(denoiser, "__self__", denoiser)
