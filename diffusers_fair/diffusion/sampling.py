"""Embeddings and noise -> latents -> images, keeping what replay needs on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.diffusion.scheduler import scaled_input


@dataclass(frozen=True)
class Trajectory:
    """One sampling of a batch of n images in K U-Net evaluations."""

    latents: Tensor
    """(n, c, h, w), z_K, in the U-Net's units."""
    inputs: tuple[Tensor, ...]
    """K U-Net inputs, each (n, c, h, w), as the scheduler scaled them; empty if not kept."""
    timesteps: Tensor
    """(K,)"""
    guidance_scale: float
    """s in epsilon = epsilon_u + s (epsilon_c - epsilon_u); 1 means no guidance."""


def initial_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal latents, each image from its own seed, the same on every device.

    Args:
        shape: (c, h, w) of one image's latents.
        seeds: one for each image; `~s`, which is negative, gives the negative of the noise of s.
        device: where the noise goes; it is always drawn on the CPU.
        dtype: in which it is drawn, too.

    Returns:
        (n, c, h, w), what a diffusers pipeline draws from one CPU generator for each seed.
    """
    drawn = [
        _noise(shape, seed, dtype) if seed >= 0 else -_noise(shape, ~seed, dtype) for seed in seeds
    ]
    return torch.cat(drawn).to(device)  # (n, c, h, w)


def _noise(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Draw the noise of one image. (1, c, h, w)."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def sample(
    unet: Any,
    scheduler: Any,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    steps: int,
    guidance_scale: float = 7.5,
    *,
    keep: bool = True,
    micro_batch: int | None = None,
) -> Trajectory:
    """Sample latents as a Stable Diffusion pipeline does, without gradients.

    Args:
        unet: a `UNet2DConditionModel`.
        scheduler: a diffusers scheduler, wrapped in `BiasedGradientScheduler` or not.
        cond: (n, L, d) prompt embeddings, or (1, L, d) shared by all images.
        uncond: the same for the empty prompt; not needed without guidance.
        noise: (n, c, h, w), standard normal.
        steps: of the scheduler.
        guidance_scale: 1 for no guidance, or more.
        keep: whether to keep the U-Net inputs for replay.
        micro_batch: images that the U-Net sees at a time; left out, all.

    Raises:
        ValueError: guidance without `uncond`, or a guidance scale below 1.
    """
    guided = guided_unet(unet, cond, uncond, len(noise), guidance_scale, micro_batch)
    inputs = []

    def evaluate(step: int, scaled: Tensor, t: Tensor) -> Tensor:
        if keep:
            inputs.append(scaled)
        return guided(scaled, t)

    latents = denoise(evaluate, scheduler, noise, steps)
    return Trajectory(latents, tuple(inputs), scheduler.timesteps, guidance_scale)


def denoise(
    evaluate: Callable[[int, Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, steps: int
) -> Tensor:
    """Go from noise to the final latents, with or without gradients as the caller has them.

    Args:
        evaluate: gives the guided prediction (n, c, h, w) for the number of the U-Net evaluation,
            from 0, the scaled latents (n, c, h, w) and the timestep.
        scheduler: a diffusers scheduler, wrapped in `BiasedGradientScheduler` or not.
        noise: (n, c, h, w), standard normal.
        steps: of the scheduler.

    Returns:
        (n, c, h, w), z_K.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching has none
    for i, t in enumerate(scheduler.timesteps):
        output = evaluate(i, scaled_input(scheduler, latents, t), t)  # (n, c, h, w)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def guided_unet(
    unet: Any,
    cond: Tensor,
    uncond: Tensor | None,
    count: int,
    scale: float,
    micro_batch: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the guided prediction as a function of `count` scaled latents and a timestep.

    Raises:
        ValueError: as `guidance` and `rows` do.
    """
    embeddings = [rows(embedding, count) for embedding, _ in guidance(scale, cond, uncond)]
    parts = torch.arange(count).split(micro_batch or count)
    shared = [torch.cat([branch[part] for branch in embeddings]) for part in parts]

    def evaluate(scaled: Tensor, t: Tensor) -> Tensor:
        found = []
        for part, embedding in zip(parts, shared, strict=True):
            output = predict(unet, torch.cat([scaled[part]] * len(embeddings)), t, embedding)
            found.append(combine(output.chunk(len(embeddings)), scale))
        return torch.cat(found)

    return evaluate


def predict(unet: Any, inputs: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
    """Evaluate the U-Net: (m, c, h, w) inputs and (m, L, d) embeddings -> (m, c, h, w)."""
    return unet(inputs, timestep, encoder_hidden_states=embeddings, return_dict=False)[0]


def guidance(
    scale: float, cond: Tensor, uncond: Tensor | None = None
) -> list[tuple[Tensor, float]]:
    """Return the embeddings of each U-Net evaluation and its share of the guided prediction.

    Raises:
        ValueError: guidance without `uncond`, or a scale below 1.
    """
    if scale < 1:
        raise ValueError(f"guidance_scale must be 1 (no guidance) or more, got {scale:g}")
    if scale == 1:
        return [(cond, 1.0)]
    if uncond is None:
        raise ValueError(
            f"guidance_scale {scale:g} needs the embeddings of the empty prompt: "
            "pass uncond, or guidance_scale=1"
        )
    return [(uncond, 1 - scale), (cond, scale)]


def rows(embeddings: Tensor, count: int) -> Tensor:
    """Return (count, L, d) of embeddings that are one for each image, or shared by all.

    Raises:
        ValueError: neither one nor `count` embeddings.
    """
    if len(embeddings) not in (1, count):
        raise ValueError(
            f"expected prompt embeddings for 1 or {count} images, got {len(embeddings)}: "
            "pass one for each image, or one for all"
        )
    return embeddings.expand(count, -1, -1)


def decode(vae: Any, latents: Tensor, micro_batch: int | None = None) -> Tensor:
    """Decode (n, c, h, w) latents to (n, 3, H, W) images in [-1, 1], differentiably."""
    parts = latents.split(micro_batch or len(latents))
    images = [vae.decode(x / vae.config.scaling_factor, return_dict=False)[0] for x in parts]
    return torch.cat(images).clamp(-1, 1)


@torch.enable_grad()
def decode_backward(
    vae: Any, latents: Tensor, grad_images: Tensor, micro_batch: int | None = None
) -> Tensor:
    """Gradient on `decode`'s images (n, 3, H, W) -> on the latents (n, c, h, w).

    Decodes again, `micro_batch` images at a time, so that the decoder's memory is theirs alone.
    """
    size = micro_batch or len(latents)
    found = []
    for part, grad in zip(latents.split(size), grad_images.split(size), strict=True):
        z = part.detach().requires_grad_()
        images = decode(vae, z)
        found += torch.autograd.grad(images, z, grad.to(images.dtype))
    return torch.cat(found)


def combine(predictions: Sequence[Tensor], scale: float) -> Tensor:
    """Combine the branches of `guidance` in the order of diffusers, for the same last bit."""
    if len(predictions) == 1:
        return predictions[0]
    uncond, cond = predictions
    return uncond + scale * (cond - uncond)
