"""Edit the denoiser's prediction for the prompt before the pipeline applies its guidance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.baselines.base import require
from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.conditioning import Conditioning, cast, expand, repeat_interleave

Predict = Callable[[Conditioning], Tensor]
"""Conditioning with k rows -> the denoiser's predictions for the same latents, (k, n, c, h, w)."""
Edit = Callable[[Tensor | None, Tensor, Predict], Tensor]
"""Takes the predictions (n, c, h, w) for the negative prompt (None without guidance) and for the
prompt, and returns a replacement for the latter."""


def require_unguided_score(method: str, pipe: Any) -> None:
    """Refuse a model whose guided prediction is not made of both branches, evaluated together.

    Raises:
        ValueError: its guidance is embedded or not linear, or its branches are evaluated apart.
    """
    family = family_of(pipe)
    is_plain = family.has_linear_guidance and family.evaluates_prompts_together
    branches = family.guidance_branches(pipe, 2.0)
    require(is_plain and len(branches) > 1, method, "needs classifier-free guidance", pipe)


@contextmanager
def edited_score(pipe: Any, edit: Edit) -> Iterator[None]:
    """Apply `edit` to the prediction of every step in this context.

    With guidance scale s the pipeline then uses e_u + s (edited - e_u).
    """
    family = family_of(pipe)

    def hook(denoiser: Any, args: tuple, kwargs: dict, output: tuple[Tensor]) -> tuple[Tensor]:
        arguments = dict(zip((family.latents_argument, "timestep"), args, strict=False)) | kwargs
        inputs = arguments[family.latents_argument]
        t = torch.as_tensor(arguments["timestep"]).flatten()[0]
        guided = pipe.do_classifier_free_guidance
        uncond, text = output[0].chunk(2) if guided else (None, output[0])
        n = len(text)

        def predict(conditioning: Conditioning) -> Tensor:
            k = len(next(iter(conditioning.values())))
            shape = text.shape[1], text.shape[2], text.shape[3]
            complete = family.complete(pipe, conditioning, shape, pipe.guidance_scale)
            rows = repeat_interleave(cast(expand(complete, k), text), n)  # k * n of them
            latents = inputs[-n:].repeat(k, 1, 1, 1)
            # `forward` itself: a call would run this hook again
            return family.predict(denoiser.forward, latents, t, rows).unflatten(0, (k, n))

        edited = edit(uncond, text, predict)
        return (edited if uncond is None else torch.cat([uncond, edited]),)

    handle = denoiser_of(pipe).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
