"""FLUX.2 klein, the base and the distilled models: a transformer with flow matching and Qwen 3."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_fair.families.base import (
    JOINT_LAYERS,
    Denoise,
    Shape,
    TransformerFamily,
    Usual,
    encoder_of,
    execution_device,
    side,
)
from diffusers_fair.families.conditioning import Conditioning


class Flux2Klein(TransformerFamily):
    """The family of FLUX.2 klein, not dev; see `Family` for what each member means."""

    name = "FLUX.2 klein"
    transformer = "Flux2Transformer2DModel"
    # the last two are in the blocks with a single stream
    targets: Mapping[str, tuple[str, ...]] = {
        "transformer": (*JOINT_LAYERS, "to_qkv_mlp_proj", "to_out")
    }
    takes_negative_prompts = False  # the pipeline uses the empty one
    evaluates_prompts_together = False  # two calls of each model

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline is of klein; dev's has another text encoder."""
        return super().matches(pipe) and "is_distilled" in pipe.config

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline, or those for distilled models."""
        if pipe.config.is_distilled:
            return Usual(guidance_scale=1.0, steps=4)
        return Usual(guidance_scale=4.0, steps=50)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: (n, L, d)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        return {"encoder_hidden_states": encode(list(prompts), execution_device(pipe))[0]}

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight; distilled models ignore the scale."""
        branches = super().guidance_branches(pipe, guidance_scale)
        return [("cond", 1.0)] if pipe.config.is_distilled else branches

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents, in which a pixel is a 2x2 patch."""
        width = side(pipe, size, multiple=2) // 2
        return pipe.transformer.config.in_channels, width, width

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return evenly spaced sigmas, as the pipeline's call, and the shift by resolution."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, h, w = shape
        options: dict[str, Any] = {"mu": compute_empirical_mu(h * w, steps)}
        if scheduler.config.get("use_flow_sigmas"):
            return {**options, "num_inference_steps": steps}
        return {**options, "sigmas": np.linspace(1.0, 1 / steps, steps)}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer on a sequence of patches: (m, c, h, w)."""
        from diffusers import Flux2KleinPipeline

        m, _, h, w = latents.shape
        embeddings, device = conditioning["encoder_hidden_states"], latents.device
        output = denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=timesteps.expand(m).to(latents.dtype) / 1000,
            guidance=None,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeddings).to(device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(latents).to(device),
            encoder_hidden_states=embeddings,
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (h, w))

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the normalization of the latents and split the patches into pixels."""
        norm = pipe.vae.bn
        mean, variance = (
            x.view(1, -1, 1, 1).to(latents) for x in (norm.running_mean, norm.running_var)
        )
        scaled = latents * (variance + pipe.vae.config.batch_norm_eps).sqrt() + mean
        return type(pipe)._unpatchify_latents(scaled)


FLUX2_KLEIN = Flux2Klein()
