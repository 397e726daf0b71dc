"""The U-Net's prediction for the prompt, edited before the pipeline's own guidance takes it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
"""Embeddings (k, L, d) -> the U-Net's predictions for the same latents, (k, n, c, h, w)."""
Edit = Callable[[Tensor | None, Tensor, Predict], Tensor]
"""Predictions (n, c, h, w) for the negative prompt (None without guidance) and for the prompt ->
what to take in place of the latter."""


@contextmanager
def edited_score(pipe: Any, edit: Edit) -> Iterator[None]:
    """Let `edit` change the prediction of every step for as long as the context lasts.

    With guidance s the pipeline then takes e_u + s (edited - e_u).
    """

    def hook(unet: Any, args: tuple, kwargs: dict, output: tuple[Tensor]) -> tuple[Tensor]:
        inputs, t = args
        guided = pipe.do_classifier_free_guidance
        uncond, text = output[0].chunk(2) if guided else (None, output[0])
        n = len(text)

        def predict(embeddings: Tensor) -> Tensor:
            k = len(embeddings)
            rows = embeddings.to(text).repeat_interleave(n, 0)  # (k * n, L, d)
            latents = inputs[-n:].repeat(k, 1, 1, 1)
            found = unet.forward(latents, t, encoder_hidden_states=rows, return_dict=False)[0]
            return found.unflatten(0, (k, n))

        edited = edit(uncond, text, predict)
        return (edited if uncond is None else torch.cat([uncond, edited]),)

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
