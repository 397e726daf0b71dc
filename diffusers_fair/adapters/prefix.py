"""The prompt prefix: an adapter's soft tokens, placed before the prompts of a pipeline."""

import re
import warnings
from typing import Any

from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.families import family_of


class PromptPrefix:
    """Adds the placeholder of soft tokens to prompts, as a user types it for a textual inversion.

    A prompt that contains the placeholder stays as it is.

    Args:
        pipe: a pipeline whose tokenizer knows the soft tokens.
        tokens: number and placeholder of the soft tokens.
        adapter_name: adapter that they belong to.
    """

    def __init__(self, pipe: Any, tokens: SoftTokens, adapter_name: str):
        self.pipe = pipe
        self.tokens = tokens
        self.adapter_name = adapter_name
        self.is_on = True

    def before(self, prompt: str) -> str:
        """Return the prompt with the placeholder before it, unless it contains the placeholder."""
        token = self.tokens.token
        typed, times = re.subn(re.escape(token), token, prompt, flags=re.IGNORECASE)
        self._warn_if_cut_off(typed.replace(token, ""))
        return typed if times else f"{token} {prompt}"

    def _warn_if_cut_off(self, prompt: str) -> None:
        """Warn if the prompt is truncated only because of the prefix."""
        (name,) = family_of(self.pipe).inversions.values()
        tokenizer = getattr(self.pipe, name)
        text = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        length = len(tokenizer(text).input_ids)  # with start and end
        limit, count = tokenizer.model_max_length, self.tokens.count
        if length <= limit < length + count:
            warnings.warn(
                f"with the {count} soft tokens of the adapter '{self.adapter_name}' before it, the "
                f"prompt has {length + count} tokens, more than the {limit} that the text encoder "
                f"reads, and its end is cut off: '{prompt.strip()}'",
                stacklevel=6,
            )
