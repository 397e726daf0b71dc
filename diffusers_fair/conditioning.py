"""Prompts -> embeddings, through whatever adapter sits in the pipeline's text encoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.adapters.soft_tokens import soft_tokens


def encode_prompts(pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Tensor:
    """Encode prompts as a Stable Diffusion pipeline does, differentiably.

    Prompts that are too long are cut off at the tokenizer's length, soft tokens included.

    Args:
        pipe: a Stable Diffusion pipeline.
        prompts: n of them.
        prefix: whether the text encoder's soft tokens, if it has any, go before the prompts. Off
            for the empty prompt of classifier-free guidance.

    Returns:
        (n, L, d), L = 77 tokens.
    """
    ids = _token_ids(pipe, prompts, prefix).to(pipe.text_encoder.device)
    return pipe.text_encoder(ids)[0]


def _token_ids(pipe: Any, prompts: Sequence[str], prefix: bool) -> Tensor:
    """Return token ids (n, L): start, soft tokens, prompt, end, padding."""
    soft = soft_tokens(pipe.text_encoder) if prefix else None
    inserted = torch.empty(0, dtype=torch.long) if soft is None else soft.ids  # (m,)
    ids = pipe.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length - len(inserted),
        truncation=True,
        return_tensors="pt",
    ).input_ids  # (n, L - m)
    return torch.cat([ids[:, :1], inserted.expand(len(ids), -1), ids[:, 1:]], dim=1)
