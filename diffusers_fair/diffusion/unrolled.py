"""Sampling in one autograd graph: the gradients that replay is compared with.

The scheduler decides which gradient the final latents carry, and their values are the same bit for
bit: a `BiasedGradientScheduler` gives Algorithm 1 of the paper as printed, a plain diffusers
scheduler the exact gradient of the sampling process (equation 9).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusers_fair.diffusion.sampling import NOTHING_TO_TRAIN, denoise, guided_prediction
from diffusers_fair.families.conditioning import Branches


@torch.enable_grad()
def unroll(
    pipe: Any,
    scheduler: Any,
    branches: Branches,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    *,
    generators: Sequence[torch.Generator] | None = None,
    last: int | None = None,
) -> Tensor:
    """Sample latents as `sampling.sample` does, differentiably, with every step checkpointed.

    Args:
        pipe: a pipeline of a known family.
        scheduler: a diffusers scheduler for the exact gradient; wrapped in
            `BiasedGradientScheduler`, for the biased one.
        branches: conditioning of each guidance branch; without guidance, "cond" is enough.
        noise: (n, c, h, w), standard normal.
        steps: number of scheduler steps.
        guidance_scale: 1 for no guidance.
        generators: as for `sampling.sample`.
        last: number of denoiser evaluations, counted from the end, that the gradient goes through;
            None for all. The output of earlier ones is treated as constant.

    Returns:
        (n, c, h, w), z_K, to back-propagate from into the conditioning and the denoiser.

    Raises:
        ValueError: a missing branch, a guidance scale that the family cannot use, `last` not
            between 1 and `steps`, or nothing is trainable.
    """
    if last is not None and not 1 <= last <= steps:
        raise ValueError(f"last must be 1 to {steps}, the number of steps, got {last}")
    guided = guided_prediction(pipe, branches, noise.shape, guidance_scale)

    def evaluate(i: int, scaled: Tensor, t: Tensor) -> Tensor:
        tracked = last is None or i >= len(scheduler.timesteps) - last
        with torch.set_grad_enabled(tracked):
            return checkpoint(guided, scaled, t, use_reentrant=False)

    latents = denoise(pipe, evaluate, scheduler, noise, steps, generators)
    if not latents.requires_grad:
        raise ValueError(NOTHING_TO_TRAIN)
    return latents
