"""The prompt prefix: a pipeline's prompts are encoded with the soft tokens before them."""

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffusers_fair.adapters.io import SoftTokens


class PromptPrefix:
    """Takes the place of one pipeline's `encode_prompt`: the host's own, with the prefix.

    It writes the placeholder before the prompt, as one would by hand for a textual inversion, and
    leaves the negative prompt as it is. A prompt that has the placeholder in it stays as it is too.

    Args:
        pipe: whose tokenizer knows the soft tokens.
        tokens: what they are called.
        adapter_name: the adapter they belong to.
    """

    def __init__(self, pipe: Any, tokens: SoftTokens, adapter_name: str):
        self.pipe = pipe
        self.tokens = tokens
        self.adapter_name = adapter_name
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Encode prompts as the host does, from the same arguments.

        Raises:
            ValueError: embeddings are given in place of a prompt.
        """
        host = type(self.pipe).encode_prompt
        call = inspect.signature(host).bind(self.pipe, *args, **kwargs)
        if self.on:
            if call.arguments.get("prompt_embeds") is not None:
                raise ValueError(
                    f"the soft tokens of the adapter '{self.adapter_name}' cannot be put before "
                    "prompt_embeds: pass the prompt as text, or set the adapter's scale to 0"
                )
            prompt = call.arguments["prompt"]
            several = isinstance(prompt, list)
            call.arguments["prompt"] = (
                [self._before(text) for text in prompt] if several else self._before(prompt)
            )
        return host(*call.args, **call.kwargs)

    def _before(self, prompt: str) -> str:
        """The prompt with the placeholder, once."""
        token = self.tokens.token
        typed, times = re.subn(re.escape(token), token, prompt, flags=re.IGNORECASE)
        self._warn_if_cut_off(typed.replace(token, ""))
        return typed if times else f"{token} {prompt}"

    def _warn_if_cut_off(self, prompt: str) -> None:
        """Warn if the prompt would fit in the text encoder without the prefix."""
        tokenizer = self.pipe.tokenizer
        text = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        length = len(tokenizer(text).input_ids)  # with start and end
        limit, count = tokenizer.model_max_length, self.tokens.count
        if length <= limit < length + count:
            warnings.warn(
                f"with the {count} soft tokens of the adapter '{self.adapter_name}' before it the "
                f"prompt has {length + count} tokens, more than the {limit} that the text encoder "
                f"reads, and its end is cut off: '{prompt.strip()}'",
                stacklevel=5,
            )


def prompt_prefix(pipe: Any) -> PromptPrefix | None:
    """Return the prefix of a pipeline's prompts, if it has one."""
    method = vars(pipe).get("encode_prompt")
    return method if isinstance(method, PromptPrefix) else None


@contextmanager
def without_prefix(pipe: Any) -> Iterator[None]:
    """Encode the pipeline's prompts as they are, for the time being."""
    prefix = prompt_prefix(pipe)
    if prefix is None:
        yield
        return
    before, prefix.on = prefix.on, False
    try:
        yield
    finally:
        prefix.on = before
