"""Stable Diffusion 1 and 2: a U-Net with classifier-free guidance and one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.families.base import (
    CLIP_LAYERS,
    UNET_LAYERS,
    ClassifierFreeGuidance,
    Denoise,
    Shape,
    Usual,
    encoder_of,
    execution_device,
    side,
)
from diffusers_fair.families.conditioning import Conditioning

EMBEDDINGS = "encoder_hidden_states"
_SCALE_EMBEDDING = "timestep_cond"


class UNetFamily(ClassifierFreeGuidance):
    """What Stable Diffusion and Stable Diffusion XL share; see `Family` for the members."""

    denoiser = "unet"
    latents_argument = "sample"

    def guidance_branches(self, pipe: Any, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight in the guided prediction.

        Models that were distilled with guidance (latent consistency models) embed the scale.
        """
        branches = super().guidance_branches(pipe, guidance_scale)
        return branches if pipe.unet.config.time_cond_proj_dim is None else [("cond", 1.0)]

    def complete(
        self, pipe: Any, conditioning: Conditioning, shape: Shape, guidance_scale: float
    ) -> Conditioning:
        """Add the embedded guidance scale, if the U-Net takes it."""
        width = pipe.unet.config.time_cond_proj_dim
        if width is None:
            return conditioning
        scale = torch.tensor([guidance_scale - 1])
        embedded = pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return {**conditioning, _SCALE_EMBEDDING: embedded.to(conditioning[EMBEDDINGS])}

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        config = pipe.unet.config
        width = config.sample_size if size is None else side(pipe, size)
        return config.in_channels, width, width

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a U-Net call."""
        return args[2] if len(args) > 2 else kwargs[EMBEDDINGS]


class StableDiffusion(UNetFamily):
    """The family of Stable Diffusion 1 and 2; see `Family` for what each member means."""

    name = "Stable Diffusion 1 or 2"
    components: tuple[str, ...] = ("unet", "text_encoder", "vae")
    targets: Mapping[str, tuple[str, ...]] = {"text_encoder": CLIP_LAYERS, "unet": UNET_LAYERS}
    # transformers 5 dropped the level `text_model.`; older versions need it, diffusers takes both
    lora_prefixes: Mapping[str, str] = {
        "text_encoder": "text_encoder.text_model.",
        "unet": "unet.",
    }
    inversions: Mapping[str, str] = {"text_encoder": "tokenizer"}
    embedding_keys: Mapping[str, str | None] = {"text_encoder": None}

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline has these components, and no second text encoder."""
        parts = (*self.components, "tokenizer")
        return all(hasattr(pipe, part) for part in parts) and not hasattr(pipe, "text_encoder_2")

    def usual(self, pipe: Any) -> Usual:
        """Return the values of the paper, section 5.1."""
        return Usual(guidance_scale=7.5, steps=20)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: (n, L, d)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        return {EMBEDDINGS: encode(list(prompts), execution_device(pipe), 1, False)[0]}

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt: (1, L, d)."""
        return self.encode(pipe, [""], prefix=False)

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the U-Net: (m, c, h, w)."""
        return denoiser(latents, timesteps, **conditioning, return_dict=False)[0]


STABLE_DIFFUSION = StableDiffusion()


# ---- for baselines -------------------------------------------------------------------------------


def token_embeddings(pipe: Any, texts: Sequence[str]) -> Tensor:
    """Encode texts token by token: (n, L, d)."""
    return STABLE_DIFFUSION.encode(pipe, texts)[EMBEDDINGS]


def guided_embeddings(
    pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | str | None
) -> tuple[Tensor, Tensor]:
    """Encode prompts and, as the pipeline does under guidance, their negative prompts.

    Returns:
        (n, L, d) each.
    """
    return pipe.encode_prompt(prompts, execution_device(pipe), 1, True, negative_prompts)


def cross_attention(pipe: Any) -> list[nn.Linear]:
    """Return the layers that compute keys and values of the prompt; none without a U-Net."""
    ends = ("attn2.to_k", "attn2.to_v")
    unet = getattr(pipe, UNetFamily.denoiser, None)
    modules = [] if unet is None else unet.named_modules()
    return [layer for name, layer in modules if name.endswith(ends)]
