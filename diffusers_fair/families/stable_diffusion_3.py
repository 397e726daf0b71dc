"""Stable Diffusion 3 and 3.5: a transformer with flow matching, two CLIP text encoders and T5."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusers_fair.families.base import (
    CLIP_LAYERS,
    JOINT_LAYERS,
    ClassifierFreeGuidance,
    Denoise,
    Shape,
    Usual,
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


class StableDiffusion3(ClassifierFreeGuidance):
    """The family of Stable Diffusion 3 and 3.5; see `Family` for what each member means."""

    name = "Stable Diffusion 3"
    denoiser = "transformer"
    latents_argument = "hidden_states"
    components: tuple[str, ...] = (
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "vae",
    )
    targets: Mapping[str, tuple[str, ...]] = {
        "text_encoder": CLIP_LAYERS,
        "text_encoder_2": CLIP_LAYERS,
        "transformer": JOINT_LAYERS,
    }
    lora_prefixes: Mapping[str, str] = {
        "text_encoder": "text_encoder.text_model.",
        "text_encoder_2": "text_encoder_2.text_model.",
        "transformer": "transformer.",
    }

    pooled: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    def matches(self, pipe: Any) -> bool:
        """Whether the pipeline has the transformer of Stable Diffusion 3."""
        return component_type(pipe, "transformer") == "SD3Transformer2DModel"

    def has_effect(self, component: str, model: Any, layer: str) -> bool:
        """Whether a layer affects images: in the last block, the prompt's tokens are only read."""
        last = f"transformer_blocks.{getattr(model.config, 'num_layers', 0) - 1}.attn.add_q_proj"
        return component != "transformer" or layer != last

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline."""
        return Usual(guidance_scale=7.0, steps=28)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method: tokens (n, L, d) and pooled (n, p)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        embeddings, _, pooled, _ = encode(
            list(prompts),
            None,
            None,
            device=execution_device(pipe),
            do_classifier_free_guidance=False,
        )
        return {_EMBEDDINGS: embeddings, _POOLED: pooled}

    def unconditional(self, pipe: Any) -> Conditioning:
        """Encode the empty prompt."""
        return self.encode(pipe, [""], prefix=False)

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        config = pipe.transformer.config
        width = side(pipe, size, multiple=config.patch_size)
        return config.in_channels, width, width

    def timestep_options(self, scheduler: Any, steps: int, shape: Shape) -> dict[str, Any]:
        """Return the number of steps and, if the scheduler takes it, the shift by resolution."""
        options = {"num_inference_steps": steps}
        if not scheduler.config.get("use_dynamic_shifting"):
            return options
        return {**options, "mu": resolution_shift(scheduler, patches(shape), max_shift=1.16)}

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer: (m, c, h, w)."""
        return denoiser(
            hidden_states=latents,
            timestep=timesteps.expand(len(latents)),
            **conditioning,
            return_dict=False,
        )[0]

    def prompt_embeddings(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the prompt embeddings (m, L, d) among the arguments of a transformer call."""
        return args[1] if len(args) > 1 else kwargs[_EMBEDDINGS]

    def vae_input(self, pipe: Any, latents: Tensor) -> Tensor:
        """Undo the scaling and the shift of the latents."""
        return super().vae_input(pipe, latents) + pipe.vae.config.shift_factor


STABLE_DIFFUSION_3 = StableDiffusion3()
