"""FLUX.1 dev and schnell: a transformer with flow matching and an embedded guidance scale.

Its text encoders are CLIP, of which only the pooled embedding is read, and T5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_fair.families.base import (
    CLIP_LAYERS,
    JOINT_LAYERS,
    ClassifierFreeGuidance,
    Denoise,
    Shape,
    Usual,
    check_guidance_scale,
    component_type,
    encoder_of,
    execution_device,
    patches,
    resolution_shift,
    side,
)
from diffusers_fair.families.conditioning import Conditioning

_EMBEDDINGS = "encoder_hidden_states"
_POOLED = "pooled_projections"
_GUIDANCE = "guidance"


class Flux(ClassifierFreeGuidance):
    """The family of FLUX.1; see `Family` for what each member means."""

    name = "FLUX.1"
    denoiser = "transformer"
    latents_argument = "hidden_states"
    components: tuple[str, ...] = ("transformer", "text_encoder", "text_encoder_2", "vae")
    targets: Mapping[str, tuple[str, ...]] = {
        "text_encoder": CLIP_LAYERS,
        "transformer": JOINT_LAYERS,
    }
    lora_prefixes: Mapping[str, str] = {
        "text_encoder": "text_encoder.text_model.",
        "transformer": "transformer.",
    }
    inversions: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    pooled: tuple[str, ...] = ("text_encoder",)
    takes_negative_prompts = False  # only with `true_cfg_scale`

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the transformer of FLUX.1."""
        return component_type(pipe, "transformer") == "FluxTransformer2DModel"

    def kind(self, pipe: Any) -> str:
        """Return the class of the pipeline, and whether the transformer has guidance layers."""
        if pipe.transformer.config.guidance_embeds:
            return f"{type(pipe).__name__} with guidance layers, as FLUX.1-dev has them,"
        return f"{type(pipe).__name__} without guidance layers, as FLUX.1-schnell,"

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' documentation for dev and schnell."""
        if pipe.transformer.config.guidance_embeds:
            return Usual(guidance_scale=3.5, steps=28)
        return Usual(guidance_scale=0.0, steps=4)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: tokens (n, L, d) and pooled (n, p)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        embeddings, pooled, _ = encode(
            list(prompts), device=execution_device(pipe), max_sequence_length=prompt_length(pipe)
        )
        return {_EMBEDDINGS: embeddings, _POOLED: pooled}

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt, which only true guidance uses."""
        return self.encode(pipe, [""], prefix=False)

    def complete(
        self, pipe: Any, conditioning: Conditioning, shape: Shape, guidance_scale: float
    ) -> Conditioning:
        """Add the guidance scale (1,), if the transformer embeds it."""
        if not pipe.transformer.config.guidance_embeds:
            return conditioning
        device = conditioning[_EMBEDDINGS].device
        guidance = torch.full([1], guidance_scale, dtype=torch.float32, device=device)
        return {**conditioning, _GUIDANCE: guidance}

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return the prompt's branch alone, as the scale is embedded or ignored."""
        check_guidance_scale(guidance_scale)
        return [("cond", 1.0)]

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents, before they are packed."""
        width = side(pipe, size, multiple=2)
        return pipe.transformer.config.in_channels // 4, width, width

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return evenly spaced sigmas, as the pipeline's call, and the shift by resolution."""
        options: dict[str, Any] = {"mu": resolution_shift(scheduler, patches(shape))}
        if scheduler.config.get("use_flow_sigmas"):
            return {**options, "num_inference_steps": steps}
        return {**options, "sigmas": np.linspace(1.0, 1 / steps, steps)}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer on packed latents: (m, c, h, w)."""
        from diffusers import FluxPipeline

        m, c, h, w = latents.shape
        tokens = conditioning[_EMBEDDINGS].shape[1]
        output = denoiser(
            hidden_states=FluxPipeline._pack_latents(latents, m, c, h, w),
            timestep=timesteps.expand(m).to(latents.dtype) / 1000,
            txt_ids=latents.new_zeros(tokens, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                m, h // 2, w // 2, latents.device, latents.dtype
            ),
            **conditioning,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, h, w, 1)

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a transformer call."""
        return args[1] if len(args) > 1 else kwargs[_EMBEDDINGS]

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling and the shift of the latents."""
        return super().vae_input(pipe, latents) + pipe.vae.config.shift_factor

    def call_options(
        self, pipe: Any, guidance_scale: float, size: int | None = None
    ) -> dict[str, Any]:
        """Return the guidance scale, the size and the length of the prompt."""
        options = super().call_options(pipe, guidance_scale, size)
        return {**options, "max_sequence_length": prompt_length(pipe)}


def prompt_length(pipe: Any) -> int:
    """Return the number of tokens that T5 reads: 512 for dev, 256 for schnell."""
    usual = 512 if pipe.transformer.config.guidance_embeds else 256
    return min(usual, pipe.tokenizer_2.model_max_length)


FLUX = Flux()
