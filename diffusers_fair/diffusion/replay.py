"""Gradient on the final latents -> gradients of embeddings and U-Net parameters, step by step.

With the U-Net input held fixed at each step, the final latents are a linear function of the model
outputs, z_K = ... + sum_i a_i output_i, so

    d loss / d output_i = C_i a_i v,    v = d loss / d z_K

and the biased gradient is a sum over steps that do not need one another: the memory of one U-Net
evaluation serves any number of steps, in micro-batches or a random subset of the steps if wanted.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fair.diffusion.sampling import Trajectory, guidance, predict, rows


def draw_steps(
    total: int, count: int, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw steps for an unbiased estimate of the sum over all of them, spread over time and images.

    The steps are cut into `count` parts, as equal as can be. Each image has one step of each part;
    over the images, the steps of a part come equally often, but for one: with images enough, the
    estimate of a batch has a share of every step.

    Args:
        total: K, number of steps there are.
        count: how many to draw for each image.
        images: n.
        generator: on the CPU.

    Returns:
        The steps (n, count), and the inverse of the probability of each to be drawn (count,).

    Raises:
        ValueError: `count` is not between 1 and `total`.
    """
    if not 1 <= count <= total:
        raise ValueError(f"can draw 1 to {total} of {total} steps, not {count}")
    parts = torch.arange(total).tensor_split(count)
    steps = torch.stack([_spread(part, images, generator) for part in parts], 1)
    return steps, torch.tensor([float(len(part)) for part in parts])


def _spread(steps: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """(images,): one of the steps each, all equally likely, and equally often but for one."""
    first = torch.randint(len(steps), (), generator=generator)
    return steps[(first + torch.randperm(images, generator=generator)) % len(steps)]


@torch.enable_grad()
def replay(
    unet: Any,
    trajectory: Trajectory,
    cond: Tensor,
    uncond: Tensor | None,
    grad_z: Tensor,
    gradient_weights: Tensor,
    *,
    steps: Tensor | None = None,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    split_guidance: bool = False,
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
        steps: (n, k), which ones to replay of each image; left out, all.
        weights: (k,), a factor for each column of `steps`, as `draw_steps` gives it; left out, 1.
        micro_batch: images at a time; left out, all. Makes no difference to the result.
        split_guidance: whether the guidance branches are evaluated one after the other, in half the
            memory. Makes none, either.

    Returns:
        Gradients of `cond` and `uncond` in their shapes, in float32 or better; None for the one
        that requires no gradient or was not used.

    Raises:
        ValueError: the arguments do not fit one another, or nothing is trainable.
    """
    if steps is None:
        steps = torch.arange(len(trajectory.timesteps)).expand(len(grad_z), -1)
    weights = torch.ones(steps.shape[-1]) if weights is None else weights
    _require_fit(trajectory, grad_z, gradient_weights, steps, weights)
    unet_trains = trains(unet)
    cond = leaf(cond)
    uncond = None if uncond is None else leaf(uncond)
    branches = [
        (embeddings, scale)
        for embeddings, scale in guidance(trajectory.guidance_scale, cond, uncond)
        if embeddings.requires_grad or unet_trains
    ]
    if not branches:
        raise ValueError(
            "nothing to train: neither cond, uncond nor a parameter of the U-Net requires a "
            "gradient; add an adapter and encode the prompts with gradients"
        )
    groups = [[branch] for branch in branches] if split_guidance else [branches]
    shares = weights * gradient_weights.cpu()[steps]  # (n, k), C_i a_i
    for column, share in zip(steps.unbind(1), shares.unbind(1), strict=True):
        for part in torch.arange(len(grad_z)).split(micro_batch or len(grad_z)):
            inputs, timesteps = _evaluations(trajectory, column, part)
            gradient = grad_z[part] * share[part].to(grad_z)[:, None, None, None]  # C_i a_i v
            for group in groups:
                own = [(rows(embeddings, len(grad_z))[part], scale) for embeddings, scale in group]
                backward_step(unet, inputs, timesteps, own, gradient)
    return cond.grad, None if uncond is None else uncond.grad


def _evaluations(trajectory: Trajectory, steps: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The U-Net inputs (m, c, h, w) and timesteps (m,) of some images, each at its own step."""
    there = steps[images]  # (m,)
    pairs = zip(there.tolist(), images.tolist(), strict=True)
    inputs = torch.stack([trajectory.inputs[step][image] for step, image in pairs])
    return inputs, trajectory.timesteps[there]


def backward_step(
    unet: Any,
    inputs: Tensor,
    timesteps: Tensor,
    branches: list[tuple[Tensor, float]],
    grad_guided: Tensor,
) -> None:
    """Evaluate the U-Net for these branches and back-propagate d loss / d guided prediction.

    Args:
        unet: whose trainable parameters get a gradient.
        inputs: (m, c, h, w).
        timesteps: (m,).
        branches: embeddings (m, L, d) and share in the guided prediction.
        grad_guided: (m, c, h, w).
    """
    embeddings = torch.cat([embeddings for embeddings, _ in branches]).to(inputs.dtype)
    gradient = torch.cat([scale * grad_guided for _, scale in branches])
    inputs, timesteps = (torch.cat([x] * len(branches)) for x in (inputs, timesteps))
    with _attention(inputs):
        outputs = predict(unet, inputs, timesteps, embeddings)
        outputs.backward(gradient.to(outputs.dtype))


def _attention(inputs: Tensor) -> AbstractContextManager[object]:
    """Of the processor's fused attention, the backward in bfloat16 takes 7 times its float32's."""
    slow = inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def trains(unet: Any) -> bool:
    """Whether any parameter of the U-Net is trainable."""
    return any(parameter.requires_grad for parameter in unet.parameters())


def leaf(embeddings: Tensor) -> Tensor:
    """Return a leaf to gather the gradient of embeddings in, in float32 or better."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return embeddings.detach().to(dtype).clone().requires_grad_(embeddings.requires_grad)


def _require_fit(
    trajectory: Trajectory,
    grad_z: Tensor,
    gradient_weights: Tensor,
    steps: Tensor,
    weights: Tensor,
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
    if steps.ndim != 2 or len(steps) != len(grad_z):
        raise ValueError(
            f"steps must be (images, steps of each) for {len(grad_z)} images, got "
            f"{tuple(steps.shape)}"
        )
    if not ((steps >= 0) & (steps < total)).all():
        raise ValueError(f"steps must lie in 0 to {total - 1}, got {steps.tolist()}")
    if weights.shape != steps.shape[1:]:
        raise ValueError(
            f"expected {steps.shape[1]} weights, one for each column of steps, got "
            f"{tuple(weights.shape)}"
        )
