"""Gradient on the final latents -> gradients of embeddings and U-Net parameters, step by step.

With the U-Net input held fixed at each step, the final latents are a linear function of the model
outputs, z_K = ... + sum_i a_i output_i, so

    d loss / d output_i = C_i a_i v,    v = d loss / d z_K

and the biased gradient is a sum over steps that do not need one another: the memory of one U-Net
evaluation serves any number of steps, in micro-batches or a random subset of the steps if wanted.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fair.sampling import Trajectory, guidance, predict, rows


def draw_steps(total: int, count: int, generator: torch.Generator) -> tuple[list[int], list[float]]:
    """Draw steps for an unbiased estimate of the sum over all of them, spread over time.

    The steps are cut into `count` parts, as equal as can be, and one is drawn of each.

    Args:
        total: K, number of steps there are.
        count: how many to draw.
        generator: on the CPU.

    Returns:
        The steps in order, and for each the inverse of its probability to be drawn.

    Raises:
        ValueError: `count` is not between 1 and `total`.
    """
    if not 1 <= count <= total:
        raise ValueError(f"can draw 1 to {total} of {total} steps, not {count}")
    parts = torch.arange(total).tensor_split(count)
    steps = [int(part[torch.randint(len(part), (), generator=generator)]) for part in parts]
    return steps, [float(len(part)) for part in parts]


@torch.enable_grad()
def replay(
    unet: Any,
    trajectory: Trajectory,
    cond: Tensor,
    uncond: Tensor | None,
    grad_z: Tensor,
    gradient_weights: Tensor,
    *,
    steps: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    micro_batch: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Back-propagate a gradient on the final latents through every step of a trajectory.

    Adds to `.grad` of the U-Net's trainable parameters. The gradients returned are for the caller
    to send on, once: `cond.backward(gradient)`. A guidance branch in which nothing is trainable
    is not evaluated.

    Args:
        unet: the U-Net of the trajectory, unchanged since.
        trajectory: with its U-Net inputs kept.
        cond: prompt embeddings as they were sampled with, (n, L, d) or (1, L, d) for all images;
            trainable if it requires a gradient.
        uncond: the same of the empty prompt; not needed without guidance.
        grad_z: (n, c, h, w), v = d loss / d z_K.
        gradient_weights: (K,), C_i a_i, from `BiasedGradientScheduler.gradient_weights()`.
        steps: which steps to replay; left out, all.
        weights: a factor for each of `steps`, as `draw_steps` gives it; left out, 1.
        micro_batch: images at a time; left out, all. Makes no difference to the result.

    Returns:
        Gradients of `cond` and `uncond` in their shapes, in float32 or better; None for the one
        that requires no gradient or was not used.

    Raises:
        ValueError: the arguments do not fit one another, or nothing is trainable.
    """
    steps = range(len(trajectory.timesteps)) if steps is None else steps
    weights = [1.0] * len(steps) if weights is None else weights
    _require_fit(trajectory, grad_z, gradient_weights, steps, weights)
    unet_trains = any(p.requires_grad for p in unet.parameters())
    cond = _leaf(cond)
    uncond = None if uncond is None else _leaf(uncond)
    branches = [
        (embeddings, share)
        for embeddings, share in guidance(trajectory.guidance_scale, cond, uncond)
        if embeddings.requires_grad or unet_trains
    ]
    if not branches:
        raise ValueError(
            "nothing to train: neither cond, uncond nor a parameter of the U-Net requires a "
            "gradient; add an adapter and encode the prompts with gradients"
        )
    for step, weight in zip(steps, weights, strict=True):
        for part in torch.arange(len(grad_z)).split(micro_batch or len(grad_z)):
            _backward(
                unet,
                trajectory.inputs[step][part],
                trajectory.timesteps[step],
                [(rows(embeddings, len(grad_z))[part], share) for embeddings, share in branches],
                grad_z[part] * (weight * gradient_weights[step].item()),  # C_i a_i v
            )
    return cond.grad, None if uncond is None else uncond.grad


def _backward(
    unet: Any,
    inputs: Tensor,
    timestep: Tensor,
    branches: list[tuple[Tensor, float]],
    grad_guided: Tensor,
) -> None:
    """Evaluate the U-Net once for all branches and back-propagate d loss / d guided output."""
    embeddings = torch.cat([embeddings for embeddings, _ in branches]).to(inputs.dtype)
    gradient = torch.cat([share * grad_guided for _, share in branches])
    with _attention(inputs):
        outputs = predict(unet, torch.cat([inputs] * len(branches)), timestep, embeddings)
        outputs.backward(gradient.to(outputs.dtype))


def _attention(inputs: Tensor) -> AbstractContextManager[object]:
    """Of the processor's fused attention, the backward in bfloat16 takes 7 times its float32's."""
    slow = inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def _leaf(embeddings: Tensor) -> Tensor:
    """Return a leaf to gather the gradient of embeddings in, in float32 or better."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.detach().to(dtype).clone().requires_grad_(embeddings.requires_grad)


def _require_fit(
    trajectory: Trajectory,
    grad_z: Tensor,
    gradient_weights: Tensor,
    steps: Sequence[int],
    weights: Sequence[float],
) -> None:
    """Refuse arguments of `replay` that do not belong together."""
    total = len(trajectory.timesteps)
    if not trajectory.inputs:
        raise ValueError("the trajectory kept no U-Net inputs: sample with keep=True")
    if grad_z.shape != trajectory.latents.shape:
        raise ValueError(
            f"grad_z must have the shape of the final latents {tuple(trajectory.latents.shape)}, "
            f"got {tuple(grad_z.shape)}"
        )
    if len(gradient_weights) != total:
        raise ValueError(
            f"expected {total} gradient weights, one for each step, got {len(gradient_weights)}: "
            "take them from the scheduler after sampling with the same number of steps"
        )
    if not all(0 <= step < total for step in steps):
        raise ValueError(f"steps must lie in 0 to {total - 1}, got {list(steps)}")
    if len(weights) != len(steps):
        raise ValueError(f"expected {len(steps)} weights, one for each step, got {len(weights)}")
