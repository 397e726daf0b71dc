"""AuraFlow: a transformer with flow matching and T5."""

from collections.abc import Mapping, Sequence
from typing import Any

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

_SIZE = 1024  # default of the pipeline's call, in pixels


class AuraFlow(TransformerFamily):
    """The family of AuraFlow; see `Family` for what each member means."""

    name = "AuraFlow"
    transformer = "AuraFlowTransformer2DModel"
    targets: Mapping[str, tuple[str, ...]] = {"transformer": JOINT_LAYERS}

    def usual(self, pipe: Any) -> Usual:
        """Return the defaults of diffusers' pipeline."""
        return Usual(guidance_scale=3.5, steps=50)

    def encode(self, pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Conditioning:
        """Encode prompts by the pipeline's own method, zeros for padding: (n, L, d)."""
        encode = encoder_of(pipe, self.encode_method, prefix=prefix)
        found = encode(list(prompts), None, False, device=execution_device(pipe))
        return {"encoder_hidden_states": found[0]}

    def noise_shape(self, pipe: Any, size: int | None = None) -> Shape:
        """Return the shape (c, h, w) of one image's latents."""
        width = side(pipe, size or _SIZE, multiple=2)
        return pipe.transformer.config.in_channels, width, width

    def predict(
        self, denoiser: Denoise, latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Evaluate the transformer: (m, c, h, w)."""
        return denoiser(
            latents,
            timestep=(timesteps / 1000).expand(len(latents)).to(latents.dtype),
            **conditioning,
            return_dict=False,
        )[0]


AURA_FLOW = AuraFlow()
