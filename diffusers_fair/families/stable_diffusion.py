"""Prompts -> embeddings, through whatever adapter sits in the pipeline."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import Tensor


def encode_prompts(pipe: Any, prompts: Sequence[str], *, prefix: bool = True) -> Tensor:
    """Encode prompts by the pipeline's own `encode_prompt`, differentiably.

    Prompts that are too long are cut off at the tokenizer's length, soft tokens included.

    Args:
        pipe: a Stable Diffusion pipeline.
        prompts: n of them.
        prefix: whether the pipeline's soft tokens, if it has any, go before the prompts. Off for
            the empty prompt of classifier-free guidance.

    Returns:
        (n, L, d), L = 77 tokens.
    """
    # the prefix is a method of this one pipeline, in front of that of its class
    encode = pipe.encode_prompt if prefix else MethodType(type(pipe).encode_prompt, pipe)
    return encode(list(prompts), pipe.text_encoder.device, 1, False)[0]
