"""The testbed: a small, deliberately biased text-to-image model and judges for its images.

`pipeline()` returns a `StableDiffusionPipeline` of 64x64 pixels, trained on synthetic portraits of
people who do not exist. It ships with the package and downloads nothing.
"""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
NAME = "testbed"  # name in recipes and for `--base`
SIZE = 64  # pixels
GUIDANCE = 4.5  # usual guidance scale


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
