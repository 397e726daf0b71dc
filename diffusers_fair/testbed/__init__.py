"""The testbeds: two small, deliberately biased text-to-image models, and judges for their images.

`pipeline()` returns a `StableDiffusionPipeline` and `flux_pipeline()` a `FluxPipeline`, both of
64x64 pixels, trained on the same synthetic portraits of people who do not exist. They ship with the
package and download nothing.
"""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import FluxPipeline, StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
NAME = "testbed"  # name in recipes and for `--base`
FLUX_NAME = "testbed-flux"
SIZE = 64  # pixels
GUIDANCE = 4.5  # usual guidance scale
FLUX_GUIDANCE = 3.0
FLUX_TOKENS = 32  # tokens of a prompt that the FLUX transformer reads


def pipeline() -> "StableDiffusionPipeline":
    """Create the base model anew: 64x64 pixels, float32, on the CPU."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from diffusers_fair.testbed import models
    from diffusers_fair.testbed.tokenizer import tokenizer

    pipe = StableDiffusionPipeline(
        vae=models.load_autoencoder(WEIGHTS),
        text_encoder=models.load_text_encoder(WEIGHTS),
        tokenizer=deepcopy(tokenizer()),  # adapters may add tokens to it
        unet=models.load_unet(WEIGHTS),
        scheduler=DPMSolverMultistepScheduler(**models.NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.register_to_config(_name_or_path=NAME)
    return pipe


def flux_pipeline() -> "FluxPipeline":
    """Create the FLUX base model anew: 64x64 pixels, float32, on the CPU.

    Its second text encoder is CLIP, too, not T5, and reads 32 tokens, so the pipeline is called
    with `max_sequence_length=testbed.FLUX_TOKENS`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from diffusers_fair.testbed import models
    from diffusers_fair.testbed.tokenizer import tokenizer

    pipe = FluxPipeline(
        vae=models.load_flux_autoencoder(WEIGHTS),
        text_encoder=models.load_text_encoder(WEIGHTS),
        text_encoder_2=models.load_text_encoder(WEIGHTS),
        tokenizer=deepcopy(tokenizer()),
        tokenizer_2=deepcopy(tokenizer()),
        transformer=models.load_flux_transformer(WEIGHTS),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.tokenizer_2.model_max_length = FLUX_TOKENS
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor  # FLUX.1 has 1024x1024 pixels
    pipe.register_to_config(_name_or_path=FLUX_NAME)
    return pipe
