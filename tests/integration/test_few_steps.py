"""Distilled models end to end: few steps, schedulers that add noise, guidance that is embedded."""

import diffusers
import families
import judging
import numpy as np
import pytest
import tiny
import torch

from diffusers_fair.diffusion.noise import Noise, initial_noise, noise_generators
from diffusers_fair.diffusion.sampling import decode, sample
from diffusers_fair.evaluation.evaluate import evaluate
from diffusers_fair.evaluation.generate import generate, generate_batch, image_seed
from diffusers_fair.families import family_of

PROMPTS = ["a baker", "a judge"]


def with_scheduler(pipe, kind, **config):
    pipe.scheduler = kind(**tiny.BETAS, **config)
    return pipe


def lcm():
    """A latent consistency model: its U-Net embeds the guidance scale."""
    pipe = tiny.pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe.unet = tiny.unet(time_cond_proj_dim=8).requires_grad_(False).eval()
    return with_scheduler(pipe, diffusers.LCMScheduler)


def turbo():
    return with_scheduler(
        families.sdxl(), diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing"
    )


def tcd():
    return with_scheduler(families.sdxl(), diffusers.TCDScheduler)


MODELS = {"turbo": (turbo, 0.0), "lcm": (lcm, 8.0), "tcd": (tcd, 0.0)}
"""Name -> makes the pipeline, usual guidance scale; all with four steps."""
STEPS = 4


@pytest.fixture(params=MODELS)
def model(request):
    make, scale = MODELS[request.param]
    return make(), {"steps": STEPS, "guidance_scale": scale, "seed": 3}


def test_training_samples_the_images_of_the_pipeline(model):
    pipe, settings = model
    family, scale = family_of(pipe), settings["guidance_scale"]
    pairs = np.array([(0, 0), (1, 0), (1, 1)])
    called = generate_batch(pipe, PROMPTS, pairs, **settings).images
    noise = [Noise(image_seed(3, int(i), int(j))) for i, j in pairs]
    shape = family.noise_shape(pipe)
    branches = {
        "cond": family.encode(pipe, [PROMPTS[i] for i, _ in pairs]),
        "uncond": family.unconditional(pipe),
    }
    generators = noise_generators(shape, noise)
    start = initial_noise(shape, noise)
    sampled = sample(
        pipe, pipe.scheduler, branches, start, STEPS, scale, generators=generators, micro_batch=2
    )
    with torch.no_grad():
        images = decode(pipe, sampled.latents)
    assert torch.allclose(images, called, atol=1e-4)


def test_images_are_the_same_in_any_batch(model):
    pipe, settings = model
    drawn = [
        torch.cat(
            [
                batch.images
                for batch in generate(
                    pipe, PROMPTS, images_per_prompt=2, batch_size=size, progress=False, **settings
                )
            ]
        )
        for size in (1, 4)
    ]
    assert torch.allclose(*drawn, atol=1e-4)
    assert (drawn[0].flatten(1).std(1) > 0).all()
    assert not torch.allclose(drawn[0][0], drawn[0][1], atol=1e-2)


@pytest.mark.slow
def test_they_are_evaluated(model):
    pipe, settings = model
    reports = [
        evaluate(
            pipe,
            judging.PROMPTS,
            [judging.HUE],
            judges=judging.judges(),
            images_per_prompt=3,
            progress=False,
            batch_size=size,
            groups=(),
            **settings,
        )
        for size in (2, 9)
    ]
    first, second = (report.records.probabilities["hue"] for report in reports)
    assert first.shape == (9, 3)
    assert np.allclose(first, second, atol=1e-3)


def test_the_embedded_guidance_scale_matters():
    pipe = lcm()
    pairs = np.array([(0, 0)])
    low, high = (
        generate_batch(pipe, PROMPTS, pairs, steps=STEPS, guidance_scale=scale, seed=3).images
        for scale in (1.5, 8.0)
    )
    assert not torch.allclose(low, high, atol=1e-3)
