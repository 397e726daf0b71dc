"""Sana: a transformer with linear attention and flow matching, Gemma and a deep-compression VAE."""

import inspect
from typing import Any

from torch import Tensor

from diffusers_fair.families.base import (
    Denoise,
    Float32Latents,
    Shape,
    Usual,
    module_of,
    side,
)
from diffusers_fair.families.conditioning import Conditioning, cast
from diffusers_fair.families.gemma import GemmaFamily


class Sana(Float32Latents, GemmaFamily):
    """The family of Sana, not Sana-Sprint; see `Family` for what each member means."""

    name = "Sana"
    transformer = "SanaTransformer2DModel"

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has Sana's transformer; Sana-Sprint's embeds the guidance."""
        return super().matches(pipe) and not pipe.transformer.config.guidance_embeds

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline."""
        return Usual(guidance_scale=4.5, steps=20)

    def encode_options(self, pipe: Any) -> dict[str, Any]:
        """Return the instructions for which the call has a default, but not `encode_prompt`."""
        name = "complex_human_instruction"
        return {name: inspect.signature(type(pipe).__call__).parameters[name].default}

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        width = side(pipe, size or _default_size(pipe))
        return pipe.transformer.config.in_channels, width, width

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer in its own dtype: (m, c, h, w) in float32."""
        model = module_of(denoiser)
        latents = latents.to(model.dtype)
        output: Tensor = denoiser(
            latents,
            timestep=timesteps.expand(len(latents)) * model.config.timestep_scale,
            **cast(conditioning, latents),
            return_dict=False,
        )[0]
        return output.float()

    def call_options(
        self, pipe: Any, guidance_scale: float, size: int | None = None
    ) -> dict[str, Any]:
        """Return the guidance scale and the exact size, for which the call has one default."""
        return {
            **super().call_options(pipe, guidance_scale, size or _default_size(pipe)),
            "use_resolution_binning": False,
        }


def _default_size(pipe: Any) -> int:
    """Return the width and height in pixels that the transformer was trained for."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


SANA = Sana()
