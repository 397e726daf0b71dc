"""Back-propagation from the final latents to conditioning and denoiser, step by step.

With the denoiser's input held fixed at each step, the final latents are a linear function of the
model outputs, z_K = ... + sum_i a_i output_i, so

    d loss / d output_i = C_i a_i v,    v = d loss / d z_K

and the biased gradient is a sum over steps that do not depend on one another. The memory of one
evaluation of the denoiser is enough for any number of steps, in micro-batches or for a random
subset of the steps.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fair.diffusion.sampling import (
    NOTHING_TO_TRAIN,
    Trajectory,
    shape_of,
    weighted_branches,
)
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.base import Shape
from diffusers_fair.families.conditioning import (
    Branches,
    Conditioning,
    cast,
    concatenate,
    expand,
    gradients,
    leaves,
    requires_grad,
    select,
)


def sample_steps(
    total: int, count: int, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample steps for an unbiased estimate of the sum over all steps.

    The steps are split into `count` parts of equal length, give or take one. Each image gets one
    step of each part. Over the images, the steps of a part occur equally often, give or take one,
    so that the estimate of a large batch covers every step.

    Args:
        total: K, the number of steps.
        count: number of steps to sample for each image.
        images: n.
        generator: a CPU generator.

    Returns:
        The steps (n, count), and the inverse of their probabilities (count,).

    Raises:
        ValueError: `count` is not between 1 and `total`.
    """
    if not 1 <= count <= total:
        raise ValueError(f"can sample 1 to {total} of {total} steps, not {count}")
    parts = torch.arange(total).tensor_split(count)
    steps = torch.stack([_spread(part, images, generator) for part in parts], 1)
    return steps, torch.tensor([float(len(part)) for part in parts])


def _spread(steps: Tensor, images: int, generator: torch.Generator) -> Tensor:
    """Sample a step per image, (images,): equally likely, and equally often give or take one."""
    first = torch.randint(len(steps), (), generator=generator)
    return steps[(first + torch.randperm(images, generator=generator)) % len(steps)]


@torch.enable_grad()
def replay(
    pipe: Any,
    trajectory: Trajectory,
    branches: Branches,
    grad_latents: Tensor,
    step_weights: Tensor,
    *,
    steps: Tensor | None = None,
    inverse_probabilities: Tensor | None = None,
    micro_batch: int | None = None,
    split_guidance: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Back-propagate a gradient on the final latents through every step of a trajectory.

    Adds to `.grad` of the denoiser's trainable parameters. Pass the returned gradients on to the
    text encoder with `conditioning.backward`, once for each branch. A guidance branch in which
    nothing is trainable is not evaluated.

    Args:
        pipe: the pipeline of the trajectory, unchanged since.
        trajectory: a trajectory that kept the inputs of the denoiser.
        branches: the conditioning that the trajectory was sampled with. Tensors that require a
            gradient are trainable.
        grad_latents: (n, c, h, w), v = d loss / d z_K.
        step_weights: (K,), C_i a_i, from `BiasedGradientScheduler.gradient_weights()`.
        steps: (n, k), steps to replay of each image; None for all.
        inverse_probabilities: (k,), factor for each column of `steps`, from `sample_steps`; None
            for 1.
        micro_batch: images per evaluation of the denoiser; None for all. Does not change the
            result.
        split_guidance: whether to evaluate the guidance branches one after the other, in half the
            memory. Does not change the result.

    Returns:
        Branch -> name -> gradient of this trainable tensor, in its shape and in float32 or better.
        Branches that were not evaluated and tensors that require no gradient are left out.

    Raises:
        ValueError: the arguments do not fit one another, or nothing is trainable.
    """
    if steps is None:
        steps = torch.arange(len(trajectory.timesteps)).expand(len(grad_latents), -1)
    if inverse_probabilities is None:
        inverse_probabilities = torch.ones(steps.shape[-1])
    _check_fit(trajectory, grad_latents, step_weights, steps, inverse_probabilities)
    branches = {name: leaves(conditioning) for name, conditioning in branches.items()}
    shape = shape_of(trajectory.latents)
    scale = trajectory.guidance_scale
    groups = trainable_branches(pipe, branches, shape, scale, split=split_guidance)
    if not groups:
        raise ValueError(NOTHING_TO_TRAIN)
    weights = inverse_probabilities * step_weights.cpu()[steps]  # (n, k), C_i a_i
    for column, weight in zip(steps.unbind(1), weights.unbind(1), strict=True):
        for part in torch.arange(len(grad_latents)).split(micro_batch or len(grad_latents)):
            inputs, timesteps = _evaluations(trajectory, column, part)
            influence = weight[part].to(grad_latents)[:, None, None, None]
            gradient = grad_latents[part] * influence  # C_i a_i v
            for group in groups:
                rows = [(select(expand(c, len(grad_latents)), part), share) for c, share in group]
                backward_step(pipe, inputs, timesteps, rows, gradient, scale)
    return {
        name: collected
        for name, conditioning in branches.items()
        if (collected := gradients(conditioning))
    }


def trainable_branches(
    pipe: Any, branches: Branches, shape: Shape, guidance_scale: float, *, split: bool = False
) -> list[list[tuple[Conditioning, float]]]:
    """Return the branches with something trainable and their weights in the guided prediction.

    With guidance that is not linear, the gradient of a branch depends on all of them: they form one
    group.

    Args:
        pipe: a pipeline of a known family.
        branches: conditioning of each guidance branch.
        shape: (c, h, w) of one image's latents.
        guidance_scale: 1 for no guidance.
        split: whether each branch forms a group of its own, with linear guidance.

    Returns:
        Groups of branches that are evaluated together; empty if nothing is trainable.
    """
    denoiser_trains = any(parameter.requires_grad for parameter in denoiser_of(pipe).parameters())
    weighted = weighted_branches(pipe, branches, shape, guidance_scale)
    trainable = [
        (conditioning, weight)
        for conditioning, weight in weighted
        if denoiser_trains or requires_grad(conditioning)
    ]
    if trainable and not family_of(pipe).has_linear_guidance:
        return [weighted]
    if split or not trainable:
        return [[branch] for branch in trainable]
    return [trainable]


def _evaluations(trajectory: Trajectory, steps: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (m, c, h, w) and timesteps (m,) of some images, each at a step of its own."""
    chosen = steps[images]  # (m,)
    pairs = zip(chosen.tolist(), images.tolist(), strict=True)
    inputs = torch.stack([trajectory.inputs[step][image] for step, image in pairs])
    return inputs, trajectory.timesteps[chosen]


def backward_step(
    pipe: Any,
    inputs: Tensor,
    timesteps: Tensor,
    branches: list[tuple[Conditioning, float]],
    grad_guided: Tensor,
    guidance_scale: float,
) -> None:
    """Evaluate the denoiser for some branches and back-propagate d loss / d guided prediction.

    Args:
        pipe: a pipeline of a known family.
        inputs: (m, c, h, w), scaled latents.
        timesteps: (m,).
        branches: conditioning with m rows, and weight in the guided prediction.
        grad_guided: (m, c, h, w).
        guidance_scale: used if guidance is not linear.
    """
    family = family_of(pipe)
    conditioning = cast(concatenate(c for c, _ in branches), inputs)
    inputs, timesteps = (torch.cat([x] * len(branches)) for x in (inputs, timesteps))
    with _attention(inputs):
        outputs = family.predict(denoiser_of(pipe), inputs, timesteps, conditioning)
        if family.has_linear_guidance:
            gradient = torch.cat([weight * grad_guided for _, weight in branches])
        else:
            outputs = family.combine(outputs.chunk(len(branches)), guidance_scale)
            gradient = grad_guided
        outputs.backward(gradient.to(outputs.dtype))


def _attention(inputs: Tensor) -> AbstractContextManager[object]:
    """Avoid fused attention on the CPU in bfloat16: its backward takes 7 times that of float32."""
    slow = inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def _check_fit(
    trajectory: Trajectory,
    grad_latents: Tensor,
    step_weights: Tensor,
    steps: Tensor,
    inverse_probabilities: Tensor,
) -> None:
    """Refuse arguments of `replay` that do not belong together."""
    total = len(trajectory.timesteps)
    if not trajectory.inputs:
        raise ValueError("the trajectory kept no inputs of the denoiser: sample with keep=True")
    if grad_latents.shape != trajectory.latents.shape:
        raise ValueError(
            "grad_latents must have the shape of the final latents "
            f"{tuple(trajectory.latents.shape)}, got {tuple(grad_latents.shape)}"
        )
    if len(step_weights) != total:
        raise ValueError(
            f"expected {total} step weights, one for each step, got {len(step_weights)}: "
            "take them from the scheduler after sampling with the same number of steps"
        )
    if steps.ndim != 2 or len(steps) != len(grad_latents):
        raise ValueError(
            f"steps must be (images, steps of each) for {len(grad_latents)} images, got "
            f"{tuple(steps.shape)}"
        )
    if not ((steps >= 0) & (steps < total)).all():
        raise ValueError(f"steps must lie in 0 to {total - 1}, got {steps.tolist()}")
    if inverse_probabilities.shape != steps.shape[1:]:
        raise ValueError(
            f"expected {steps.shape[1]} inverse probabilities, one for each column of steps, got "
            f"{tuple(inverse_probabilities.shape)}"
        )
