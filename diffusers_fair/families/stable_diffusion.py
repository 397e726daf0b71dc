"""Stable Diffusion 1 and 2: a U-Net with classifier-free guidance and one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn

from diffusers_fair.families.base import Denoise, execution_device
from diffusers_fair.families.conditioning import Conditioning

EMBEDDINGS = "encoder_hidden_states"


class StableDiffusion:
    """The family of Stable Diffusion 1 and 2; see `Family` for what each member means."""

    name = "Stable Diffusion 1 or 2"
    denoiser = "unet"
    components: tuple[str, ...] = ("unet", "text_encoder", "vae")
    targets: Mapping[str, tuple[str, ...]] = {
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),  # attention, MLP
        "unet": ("to_q", "to_k", "to_v", "to_out.0"),  # attention
    }
    # transformers 5 dropped the level `text_model.`; older versions need it, diffusers takes both
    lora_prefixes: Mapping[str, str] = {
        "text_encoder": "text_encoder.text_model.",
        "unet": "unet.",
    }
    inversions: Mapping[str, str] = {"text_encoder": "tokenizer"}
    encode_method = "encode_prompt"
    guidance_scale = 7.5  # section 5.1 of the paper
    steps = 20

    def matches(self, pipe: Any) -> bool:
        """Whether a pipeline has these components, and no second text encoder."""
        parts = (*self.components, "tokenizer")
        return all(hasattr(pipe, part) for part in parts) and not hasattr(pipe, "text_encoder_2")

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: (n, L, d)."""
        # an adapter's prefix wraps the method on the instance; the class has the plain one
        encode = pipe.encode_prompt if prefix else MethodType(type(pipe).encode_prompt, pipe)
        return {EMBEDDINGS: encode(list(prompts), execution_device(pipe), 1, False)[0]}

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt: (1, L, d)."""
        return self.encode(pipe, [""], prefix=False)

    def noise_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of one image's latents."""
        config = pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the U-Net: (m, c, h, w)."""
        return denoiser(latents, timesteps, **conditioning, return_dict=False)[0]

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a U-Net call."""
        return args[2] if len(args) > 2 else kwargs[EMBEDDINGS]

    def guidance_branches(self, guidance_scale: float) -> list[tuple[str, float]]:
        """Return each branch and its weight in the guided prediction.

        Raises:
            ValueError: a scale below 1.
        """
        if guidance_scale < 1:
            raise ValueError(
                f"guidance_scale must be 1 (no guidance) or more, got {guidance_scale:g}"
            )
        if guidance_scale == 1:
            return [("cond", 1.0)]
        return [("uncond", 1 - guidance_scale), ("cond", guidance_scale)]

    def combine(self, predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
        """Combine the branches in diffusers' order of operations, for the same last bit."""
        if len(predictions) == 1:
            return predictions[0]
        uncond, cond = predictions
        return uncond + guidance_scale * (cond - uncond)

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling of the latents."""
        return latents / pipe.vae.config.scaling_factor


STABLE_DIFFUSION = StableDiffusion()


# ---- for baselines that only support this family -------------------------------------------------


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
    """Return the layers that compute keys and values of the prompt in the U-Net."""
    ends = ("attn2.to_k", "attn2.to_v")
    return [layer for name, layer in pipe.unet.named_modules() if name.endswith(ends)]
