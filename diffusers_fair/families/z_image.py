"""Z-Image and Z-Image-Turbo: a transformer with flow matching that takes lists of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusers_fair.families.base import (
    Denoise,
    Float32Latents,
    Shape,
    Usual,
    check_guidance_scale,
    encoder_of,
    execution_device,
    module_of,
    patches,
    resolution_shift,
    side,
)
from diffusers_fair.families.conditioning import Conditioning

_TOKENS = 512  # default of the pipeline's call
_SIZE = 1024  # likewise, in pixels


class ZImage(Float32Latents):
    """The family of Z-Image; see `Family` for what each member means."""

    name = "Z-Image"
    transformer = "ZImageTransformer2DModel"
    latents_argument = "x"
    evaluates_prompts_together = False  # lists, and two calls of the text encoder

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline, or those of its documentation for Turbo."""
        if "turbo" in str(pipe.name_or_path).lower():
            return Usual(guidance_scale=0.0, steps=8)
        return Usual(guidance_scale=5.0, steps=50)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: padded tokens (n, L, d) and mask (n, L)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        rows, _ = encode(list(prompts), execution_device(pipe), False, max_sequence_length=_TOKENS)
        return {
            "embeddings": torch.stack([pad(x, (0, 0, 0, _TOKENS - len(x))) for x in rows]),
            "mask": torch.stack([torch.arange(_TOKENS, device=x.device) < len(x) for x in rows]),
        }

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight; a scale of 0 disables guidance, one of 1 does not."""
        check_guidance_scale(guidance_scale)
        if guidance_scale == 0:
            return [("cond", 1.0)]
        return [("cond", 1 + guidance_scale), ("uncond", -guidance_scale)]

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the branches in diffusers' order of operations, for the same last bit."""
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        return cond + guidance_scale * (cond - uncond)

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        width = side(pipe, size or _SIZE, multiple=2)
        return pipe.transformer.in_channels, width, width

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return evenly spaced sigmas and the shift by resolution, as the pipeline's call."""
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        return {"sigmas": sigmas, "mu": resolution_shift(scheduler, patches(shape))}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer, whose time and velocity have the opposite direction."""
        dtype = module_of(denoiser).dtype
        images = latents.to(dtype).unsqueeze(2)  # (m, c, 1, h, w), videos of one frame
        rows = zip(conditioning["embeddings"].to(dtype), conditioning["mask"], strict=True)
        output = denoiser(
            list(images),
            ((1000 - timesteps) / 1000).expand(len(images)),
            [embeddings[mask] for embeddings, mask in rows],
            return_dict=False,
        )[0]
        return -torch.stack(output).float().squeeze(2)

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling and the shift of the latents."""
        return super().vae_input(pipe, latents) + pipe.vae.config.shift_factor


Z_IMAGE = ZImage()
