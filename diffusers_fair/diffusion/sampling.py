"""Sampling and decoding, which keeps the denoiser inputs that replay needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.diffusion.scheduler import scaled_input, step_options
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.base import Shape
from diffusers_fair.families.conditioning import (
    Branches,
    Conditioning,
    concatenate,
    expand,
    select,
)

NOTHING_TO_TRAIN = (
    "nothing to train: neither the conditioning nor a parameter of the denoiser requires a "
    "gradient; add an adapter and encode the prompts with gradients"
)


@dataclass(frozen=True)
class Trajectory:
    """The sampling of n images in K evaluations of the denoiser."""

    latents: Tensor
    """(n, c, h, w), the final latents z_K, scaled as the denoiser takes them."""
    inputs: tuple[Tensor, ...]
    """K inputs of the denoiser, each (n, c, h, w), scaled by the scheduler; empty if not kept."""
    timesteps: Tensor
    """(K,)"""
    guidance_scale: float
    """s in epsilon = epsilon_u + s (epsilon_c - epsilon_u); 1 means no guidance."""


@torch.no_grad()
def sample(
    pipe: Any,
    scheduler: Any,
    branches: Branches,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    *,
    generators: Sequence[torch.Generator] | None = None,
    keep: bool = True,
    micro_batch: int | None = None,
) -> Trajectory:
    """Sample latents as the pipeline's own call does, without gradients.

    Args:
        pipe: a pipeline of a known family.
        scheduler: a diffusers scheduler, wrapped in `BiasedGradientScheduler` or not.
        branches: conditioning of each guidance branch; without guidance, "cond" is enough.
        noise: (n, c, h, w), standard normal.
        steps: number of scheduler steps.
        guidance_scale: 1 for no guidance.
        generators: n generators of the noise that a stochastic scheduler adds, from
            `noise_generators`; None for torch's own.
        keep: whether to keep the inputs of the denoiser for replay.
        micro_batch: images per evaluation of the denoiser; None for all.

    Raises:
        ValueError: a missing branch, or a guidance scale that the family cannot use.
    """
    guided = guided_prediction(pipe, branches, noise.shape, guidance_scale, micro_batch)
    inputs = []

    def evaluate(step: int, scaled: Tensor, t: Tensor) -> Tensor:
        if keep:
            inputs.append(scaled)
        return guided(scaled, t)

    latents = denoise(pipe, evaluate, scheduler, noise, steps, generators)
    return Trajectory(latents, tuple(inputs), scheduler.timesteps, guidance_scale)


def denoise(
    pipe: Any,
    evaluate: Callable[[int, Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Run the sampling loop from noise to the final latents, with gradients if they are enabled.

    Args:
        pipe: a pipeline of a known family.
        evaluate: (step from 0, scaled latents (n, c, h, w), timestep) -> guided prediction
            (n, c, h, w).
        scheduler: a diffusers scheduler, wrapped in `BiasedGradientScheduler` or not.
        noise: (n, c, h, w), standard normal.
        steps: number of scheduler steps.
        generators: as for `sample`.

    Returns:
        (n, c, h, w), z_K.
    """
    timesteps = family_of(pipe).timestep_options(scheduler, steps, shape_of(noise))
    scheduler.set_timesteps(**timesteps, device=noise.device)
    options = step_options(scheduler, None if generators is None else list(generators))
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none
    for i, t in enumerate(scheduler.timesteps):
        output = evaluate(i, scaled_input(scheduler, latents, t), t)  # (n, c, h, w)
        latents = scheduler.step(output, t, latents, return_dict=False, **options)[0]
    return latents


def shape_of(latents: Tensor) -> Shape:
    """Return the shape (c, h, w) of one image's latents."""
    _, c, h, w = latents.shape
    return c, h, w


def guided_prediction(
    pipe: Any,
    branches: Branches,
    shape: Sequence[int],
    guidance_scale: float,
    micro_batch: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the guided prediction as a function of scaled latents and a timestep.

    Args:
        pipe: a pipeline of a known family.
        branches: conditioning of each guidance branch.
        shape: (n, c, h, w) of the latents.
        guidance_scale: 1 for no guidance.
        micro_batch: images per evaluation of the denoiser; None for all.

    Raises:
        ValueError: as in `weighted_branches`, or conditioning with neither one row nor n.
    """
    family, denoiser = family_of(pipe), denoiser_of(pipe)
    count, *latents_shape = shape
    weighted = weighted_branches(pipe, branches, latents_shape, guidance_scale)
    rows = [expand(c, count) for c, _ in weighted]
    parts = torch.arange(count).split(micro_batch or count)
    inputs = [concatenate(select(branch, part) for branch in rows) for part in parts]

    def evaluate(scaled: Tensor, t: Tensor) -> Tensor:
        guided = []
        for part, conditioning in zip(parts, inputs, strict=True):
            latents = torch.cat([scaled[part]] * len(rows))
            output = family.predict(denoiser, latents, t, conditioning)
            guided.append(family.combine(output.chunk(len(rows)), guidance_scale))
        return torch.cat(guided)

    return evaluate


def weighted_branches(
    pipe: Any, branches: Branches, shape: Sequence[int], guidance_scale: float
) -> list[tuple[Conditioning, float]]:
    """Return the conditioning of each evaluated branch and its weight in the guided prediction.

    Args:
        pipe: a pipeline of a known family.
        branches: conditioning of each guidance branch, as the family encodes it.
        shape: (c, h, w) of one image's latents.
        guidance_scale: 1 for no guidance.

    Raises:
        ValueError: guidance without "uncond", or a scale that the family cannot use.
    """
    family = family_of(pipe)
    c, h, w = shape
    weights = family.guidance_branches(pipe, guidance_scale)
    for name, _ in weights:
        if name not in branches:
            raise ValueError(
                f"guidance_scale {guidance_scale:g} needs the embeddings of the empty prompt: "
                f"pass {name}, or guidance_scale=1"
            )
    return [
        (family.complete(pipe, branches[name], (c, h, w), guidance_scale), weight)
        for name, weight in weights
    ]


def decode(pipe: Any, latents: Tensor, micro_batch: int | None = None) -> Tensor:
    """Decode (n, c, h, w) latents to (n, 3, H, W) images in [-1, 1], differentiably.

    For a gradient with a VAE that overflows in float16, use `decode_backward`.
    """
    family = family_of(pipe)
    with _decoder_dtype(pipe) as dtype:
        parts = latents.to(dtype).split(micro_batch or len(latents))
        return torch.cat([family.decode(pipe, z) for z in parts]).clamp(-1, 1)


@contextmanager
def _decoder_dtype(pipe: Any) -> Iterator[torch.dtype]:
    """Convert the VAE to the data type in which it decodes, within a `with` block."""
    before = pipe.vae.dtype
    dtype = family_of(pipe).decoder_dtype(pipe)
    pipe.vae.to(dtype)
    try:
        yield dtype
    finally:
        pipe.vae.to(before)


@torch.enable_grad()
def decode_backward(
    pipe: Any, latents: Tensor, grad_images: Tensor, micro_batch: int | None = None
) -> Tensor:
    """Back-propagate a gradient on the images (n, 3, H, W) to the latents (n, c, h, w).

    Decodes `micro_batch` images at a time, which bounds the memory of the decoder.
    """
    size = micro_batch or len(latents)
    gradients = []
    for part, grad in zip(latents.split(size), grad_images.split(size), strict=True):
        z = part.detach().requires_grad_()
        with _decoder_dtype(pipe):  # the backward pass needs the same weights
            images = decode(pipe, z)
            gradients += torch.autograd.grad(images, z, grad.to(images.dtype))
    return torch.cat(gradients)
