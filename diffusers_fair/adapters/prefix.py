"""The prompt prefix: an adapter's soft tokens, placed before the prompts of a pipeline."""

import logging
import re
from collections.abc import Collection
from typing import Any

from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.layers import check_projections, is_fused_into, strengths
from diffusers_fair.families import family_of, soft_token_encoders

logger = logging.getLogger(__name__)


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
        self._cut_off: set[str] = set()  # prompts, of which a warning has been logged

    def is_on(self) -> bool:
        """Whether prompts get the prefix."""
        return True

    def before(self, prompt: str) -> str:
        """Return the prompt with the placeholder before it, unless it contains the placeholder."""
        token = self.tokens.token
        typed, times = re.subn(re.escape(token), token, prompt, flags=re.IGNORECASE)
        self._warn_if_cut_off(typed.replace(token, ""))
        return typed if times else f"{token} {prompt}"

    def _warn_if_cut_off(self, prompt: str) -> None:
        """Warn if the prompt is truncated only because of the prefix."""
        # the tokenizers of several text encoders split prompts in the same way
        _, tokenizer = next(iter(soft_token_encoders(self.pipe).values()))
        text = self.pipe.maybe_convert_prompt(prompt, tokenizer)
        length = len(tokenizer(text).input_ids)  # with start and end
        limit, count = tokenizer.model_max_length, self.tokens.count
        if length <= limit < length + count and prompt not in self._cut_off:
            self._cut_off.add(prompt)
            logger.warning(
                f"with the {count} soft tokens of the adapter '{self.adapter_name}' before it, the "
                f"prompt has {length + count} tokens, more than the {limit} that the text encoder "
                f"reads, and its end is cut off: '{prompt.strip()}'"
            )


class LoadedPrefix(PromptPrefix):
    """The prefix of a loaded adapter, which follows what diffusers' own methods do to the adapter.

    If the adapter has LoRA layers, the prefix is on when they are on. Without its soft tokens, as
    after `unload_textual_inversion`, an adapter without layers is off.

    Args:
        pipe: a pipeline that has loaded the soft tokens as a textual inversion.
        tokens: number and placeholder of the soft tokens.
        adapter_name: adapter that they belong to.
        components: components of the pipeline in which the adapter has LoRA layers, too.
    """

    def __init__(
        self, pipe: Any, tokens: SoftTokens, adapter_name: str, components: Collection[str]
    ):
        super().__init__(pipe, tokens, adapter_name)
        self.components = tuple(components)
        self.is_enabled = True
        """Whether an adapter without layers is on; otherwise its layers decide."""

    def is_on(self) -> bool:
        """Whether prompts get the prefix.

        Raises:
            ValueError: only a part of the adapter is on or left, its layers are scaled, or the text
                encoder and the tokenizer do not belong together.
        """
        if not self.components:
            return self.is_enabled and self._has_tokens()
        factors = set().union(*self._strengths().values())
        if not any(factors):  # removed, disabled or scaled to 0
            return False
        self.check_complete()
        check_projections(self.pipe)
        if factors != {1.0}:
            raise ValueError(
                f"the soft tokens of the adapter '{self.adapter_name}' need all its LoRA layers at "
                f"strength 1, or none, but they have the strengths {sorted(factors)}: call "
                "set_fair_adapter_scale with 1 or 0"
            )
        return True

    def check_complete(self) -> None:
        """Refuse an adapter of which a part has been removed from the pipeline.

        Raises:
            ValueError: layers or soft tokens are missing, or the text encoder and the tokenizer do
                not belong together.
        """
        found = self._strengths()
        lost = [f"layers of the {name}" for name in self.components if name not in found]
        if not self._has_tokens():
            lost.append("soft tokens")
        if lost:
            raise ValueError(
                f"the {' and '.join(lost)} of the adapter '{self.adapter_name}' were removed from "
                "the pipeline: call unload_fair_adapter, and load the adapter again"
            )

    def _strengths(self) -> dict[str, set[float]]:
        found = strengths(self.pipe, self.adapter_name)
        if not found and is_fused_into(self.pipe, self.adapter_name):
            return {name: {1.0} for name in self.components}  # removed after they had been fused
        return found

    def _has_tokens(self) -> bool:
        """Whether all tokenizers know the soft tokens."""
        encoders = soft_token_encoders(self.pipe)
        for name, (encoder, tokenizer) in encoders.items():
            rows = encoder.get_input_embeddings().num_embeddings
            if rows != len(tokenizer):
                raise ValueError(
                    f"the {name} has {rows} embeddings for the {len(tokenizer)} tokens of the "
                    f"{family_of(self.pipe).inversions[name]}, as one of them was replaced after "
                    f"the adapter '{self.adapter_name}' was loaded: call unload_fair_adapter, and "
                    "load it again"
                )
        names = {*self.tokens.names}
        return all(names <= known.get_added_vocab().keys() for _, known in encoders.values())
