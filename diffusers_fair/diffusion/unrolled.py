"""Sampling in one graph: the gradients that replay is measured against.

The scheduler decides which gradient the final latents carry, and the values are the same bit for
bit: a `BiasedGradientScheduler` gives Algorithm 1 of the paper as it is printed, any scheduler as
diffusers ships it the exact gradient of the sampling process (equation 9).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_fair.diffusion.sampling import denoise, guided_unet


@torch.enable_grad()
def unroll(
    unet: Any,
    scheduler: Any,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor,
    steps: int,
    guidance_scale: float = 7.5,
    *,
    last: int | None = None,
) -> Tensor:
    """Sample latents as `sampling.sample` does, differentiably, each U-Net evaluation checkpointed.

    Args:
        unet: a `UNet2DConditionModel`.
        scheduler: a diffusers scheduler for the exact gradient; wrapped in
            `BiasedGradientScheduler`, for the biased one.
        cond: (n, L, d) prompt embeddings, or (1, L, d) shared by all images.
        uncond: the same for the empty prompt; not needed without guidance.
        noise: (n, c, h, w), standard normal.
        steps: of the scheduler.
        guidance_scale: 1 for no guidance, or more.
        last: number of U-Net evaluations, from the end, that the gradient goes through; what the
            earlier ones gave counts as fixed. Left out, all.

    Returns:
        (n, c, h, w), z_K, to be back-propagated from into embeddings and U-Net parameters.

    Raises:
        ValueError: guidance without `uncond`, a guidance scale below 1, `last` not between 1 and
            `steps`, or nothing is trainable.
    """
    if last is not None and not 1 <= last <= steps:
        raise ValueError(f"last must be 1 to {steps}, the number of steps, got {last}")
    guided = guided_unet(unet, cond, uncond, len(noise), guidance_scale)

    def evaluate(i: int, scaled: Tensor, t: Tensor) -> Tensor:
        tracked = last is None or i >= len(scheduler.timesteps) - last
        with torch.set_grad_enabled(tracked):
            return checkpoint(guided, scaled, t, use_reentrant=False)

    latents = denoise(evaluate, scheduler, noise, steps)
    if not latents.requires_grad:
        raise ValueError(
            "nothing to train: neither cond, uncond nor a parameter of the U-Net requires a "
            "gradient; add an adapter and encode the prompts with gradients"
        )
    return latents
