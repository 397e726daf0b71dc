"""Lumina 2: a transformer with flow matching and Gemma, whose guidance is normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_fair.families.base import Denoise, Shape, Usual, normalised, resolution_shift, side
from diffusers_fair.families.conditioning import Conditioning
from diffusers_fair.families.gemma import GemmaFamily


class Lumina2(GemmaFamily):
    """The family of Lumina 2; see `Family` for what each member means."""

    name = "Lumina 2"
    transformer = "Lumina2Transformer2DModel"
    has_linear_guidance = False
    evaluates_prompts_together = False  # a call of the transformer for each branch

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline."""
        return Usual(guidance_scale=4.0, steps=30)

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        width = side(pipe, size, multiple=2)
        return pipe.transformer.config.in_channels, width, width

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return evenly spaced sigmas and the shift, as the pipeline's call.

        The call takes the number of channels for the number of tokens, so the shift is the same at
        each resolution.
        """
        sigmas = np.linspace(1.0, 1 / steps, steps)
        return {"sigmas": sigmas, "mu": resolution_shift(scheduler, shape[0])}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer, whose time and velocity have the opposite direction."""
        return -denoiser(
            hidden_states=latents,
            timestep=(1 - timesteps / 1000).expand(len(latents)),
            **conditioning,
            return_dict=False,
        )[0]

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the branches, then give each row of the latents the norm of the prompt's."""
        guided = super().combine(predictions, guidance_scale)
        return normalised(guided, predictions[-1]) if len(predictions) > 1 else guided

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling and the shift of the latents."""
        return super().vae_input(pipe, latents) + pipe.vae.config.shift_factor


LUMINA2 = Lumina2()
