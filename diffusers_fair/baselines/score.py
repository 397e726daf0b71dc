"""Edit the U-Net's prediction for the prompt before the pipeline applies its guidance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.families import denoiser_of, family_of
from diffusers_fair.families.conditioning import Conditioning, cast, repeat_interleave

Predict = Callable[[Conditioning], Tensor]
"""Conditioning with k rows -> the U-Net's predictions for the same latents, (k, n, c, h, w)."""
Edit = Callable[[Tensor | None, Tensor, Predict], Tensor]
"""Takes the predictions (n, c, h, w) for the negative prompt (None without guidance) and for the
prompt, and returns a replacement for the latter."""


@contextmanager
def edited_score(pipe: Any, edit: Edit) -> Iterator[None]:
    """Apply `edit` to the prediction of every step in this context.

    With guidance scale s the pipeline then uses e_u + s (edited - e_u).
    """
    family = family_of(pipe)

    def hook(denoiser: Any, args: tuple, kwargs: dict, output: tuple[Tensor]) -> tuple[Tensor]:
        inputs, t = args
        guided = pipe.do_classifier_free_guidance
        uncond, text = output[0].chunk(2) if guided else (None, output[0])
        n = len(text)

        def predict(conditioning: Conditioning) -> Tensor:
            rows = repeat_interleave(cast(conditioning, text), n)  # k * n of them
            k = len(next(iter(rows.values()))) // n
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
