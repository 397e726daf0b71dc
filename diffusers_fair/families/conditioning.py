"""The denoiser's conditioning: named tensors with one row for each image.

It contains the prompt embeddings and whatever else a denoiser takes besides the latents and the
timestep. Some of these tensors may require a gradient, if the text encoder is trained.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""Name -> tensor (n, ...), or (1, ...) shared by all images."""
Branches = Mapping[str, Conditioning]
"""Guidance branch, "cond" or "uncond" -> its conditioning."""


def expand(conditioning: Conditioning, count: int) -> Conditioning:
    """Expand tensors that all images share to one row for each of `count` images.

    Raises:
        ValueError: neither one row nor `count` rows.
    """
    for tensor in conditioning.values():
        if len(tensor) not in (1, count):
            raise ValueError(
                f"expected prompt embeddings for 1 or {count} images, got {len(tensor)}: "
                "pass one for each image, or one for all"
            )
    return {name: x.expand(count, *x.shape[1:]) for name, x in conditioning.items()}


def select(conditioning: Conditioning, rows: Tensor | slice) -> Conditioning:
    """Select some of the rows."""
    return {name: x[rows] for name, x in conditioning.items()}


def repeat_interleave(conditioning: Conditioning, times: int) -> Conditioning:
    """Repeat each row, `times` copies next to one another."""
    return {name: x.repeat_interleave(times, dim=0) for name, x in conditioning.items()}


def concatenate(parts: Iterable[Conditioning]) -> Conditioning:
    """Join the rows of several conditionings that have the same names."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def cast(conditioning: Conditioning, like: Tensor) -> Conditioning:
    """Move the tensors to the device of `like`, and floating-point ones to its dtype."""
    return {
        name: x.to(like) if x.is_floating_point() else x.to(like.device)
        for name, x in conditioning.items()
    }


def requires_grad(conditioning: Conditioning) -> bool:
    """Whether any of the tensors requires a gradient."""
    return any(x.requires_grad for x in conditioning.values())


def leaves(conditioning: Conditioning) -> Conditioning:
    """Replace trainable tensors by leaves that collect a gradient in float32 or better."""
    return {name: _leaf(x) if x.requires_grad else x for name, x in conditioning.items()}


def gradients(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the gradients that leaves have collected, by name."""
    return {name: x.grad for name, x in conditioning.items() if x.is_leaf and x.grad is not None}


def backward(conditioning: Conditioning, gradients: Mapping[str, Tensor]) -> None:
    """Back-propagate gradients of a conditioning to the parameters that it was computed from.

    All tensors are back-propagated in one call: they share a graph, which the first call frees.

    Args:
        conditioning: as a text encoder returned it.
        gradients: of some of its tensors, as `gradients` or `replay` returns them.
    """
    tensors = [conditioning[name] for name in gradients]
    pairs = zip(tensors, gradients.values(), strict=True)
    torch.autograd.backward(tensors, [gradient.to(x) for x, gradient in pairs])


def _leaf(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(dtype).clone().requires_grad_()
