"""Stable Diffusion XL and its distillations: a U-Net with two CLIP text encoders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.families.base import (
    CLIP_LAYERS,
    UNET_LAYERS,
    Denoise,
    Shape,
    Usual,
    encoder_of,
    execution_device,
)
from diffusers_fair.families.conditioning import Conditioning
from diffusers_fair.families.stable_diffusion import EMBEDDINGS, UNetFamily

_POOLED = "text_embeds"
_SIZES = "time_ids"


class StableDiffusionXL(UNetFamily):
    """The family of Stable Diffusion XL; see `Family` for what each member means."""

    name = "Stable Diffusion XL"
    components: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2", "vae")
    targets: Mapping[str, tuple[str, ...]] = {
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
        "unet": UNET_LAYERS,
    }
    lora_prefixes: Mapping[str, str] = {
        "text_encoder": "text_encoder.text_model.",
        "text_encoder_2": "text_encoder_2.text_model.",
        "unet": "unet.",
    }
    inversions: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    embedding_keys: Mapping[str, str | None] = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
    }
    pooled: tuple[str, ...] = ("text_encoder_2",)

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline has these components."""
        return all(hasattr(pipe, part) for part in (*self.components, "tokenizer_2"))

    def usual(self, pipe: Any) -> Usual:
        """Return the guidance scale of diffusers' pipeline."""
        return Usual(guidance_scale=5.0, steps=25)

    def has_effect(self, component: str, model: Any, layer: str) -> bool:
        """Whether a layer affects images.

        Embeddings are read before the last block; of the first text encoder, nothing else is read.
        """
        if component != "text_encoder":
            return True
        return f"layers.{model.config.num_hidden_layers - 1}." not in layer

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: tokens (n, L, d) and pooled (n, p)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        embeddings, _, pooled, _ = encode(
            list(prompts), device=execution_device(pipe), do_classifier_free_guidance=False
        )
        return {EMBEDDINGS: embeddings, _POOLED: pooled}

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt, or return the zeros that stand for it in most models."""
        encoded = self.encode(pipe, [""], prefix=False)
        if not pipe.config.force_zeros_for_empty_prompt:
            return encoded
        return {name: torch.zeros_like(x, requires_grad=False) for name, x in encoded.items()}

    def complete(
        self, pipe: Any, conditioning: Conditioning, shape: Shape, guidance_scale: float
    ) -> Conditioning:
        """Add original size, crop and target size in pixels: (1, 6)."""
        conditioning = super().complete(pipe, conditioning, shape, guidance_scale)
        height, width = (side * pipe.vae_scale_factor for side in shape[1:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]])
        return {**conditioning, _SIZES: sizes.to(conditioning[EMBEDDINGS])}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the U-Net: (m, c, h, w)."""
        added = {name: conditioning[name] for name in (_POOLED, _SIZES)}
        others = {name: x for name, x in conditioning.items() if name not in added}
        return denoiser(latents, timesteps, **others, added_cond_kwargs=added, return_dict=False)[0]

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling of the latents, by channel where the VAE has statistics of them."""
        config = pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().vae_input(pipe, latents)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        return latents * std / config.scaling_factor + mean

    def decoder_dtype(self, pipe: Any) -> torch.dtype:
        """Return the data type of the VAE, or float32 if the VAE overflows in float16."""
        dtype = super().decoder_dtype(pipe)
        overflows = dtype == torch.float16 and pipe.vae.config.force_upcast
        return torch.float32 if overflows else dtype


STABLE_DIFFUSION_XL = StableDiffusionXL()
