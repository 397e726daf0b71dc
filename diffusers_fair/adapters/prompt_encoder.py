"""The one method of a pipeline that adapters replace: `encode_prompt`, for all of them at once."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers_fair.adapters.prefix import PromptPrefix
from diffusers_fair.adapters.word_switch import WordSwitch


class PromptEncoder:
    """Takes the place of one pipeline's `encode_prompt`: the host's own, with what adapters do.

    Soft tokens go before the prompts, not before the negative ones; adapters that respect words are
    off for the prompts that have such words, and for their negative ones.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.prefix: PromptPrefix | None = None
        self.switches: dict[str, WordSwitch] = {}
        """Name of an adapter that respects words -> its switch."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the host does, from the same arguments.

        Raises:
            ValueError: embeddings are given in place of a prompt, or an adapter that has to be
                switched off for a prompt is fused into the weights.
        """
        host = type(self.pipe).encode_prompt
        call = inspect.signature(host).bind(self.pipe, *args, **kwargs)
        if call.arguments.get("prompt_embeds") is not None:
            self._check_needs_no_text()
            return host(*call.args, **call.kwargs)
        prompt = call.arguments["prompt"]
        several = isinstance(prompt, list)
        prompts = prompt if several else [prompt]
        named = {name: switch.named(prompts) for name, switch in self.switches.items()}
        prompts = self._with_prefix(prompts, named)
        call.arguments["prompt"] = prompts if several else prompts[0]
        with ExitStack() as stack:
            for name, switch in self.switches.items():
                stack.enter_context(switch.encoding(named[name]))
            embeds = host(*call.args, **call.kwargs)
        for name, switch in self.switches.items():
            switch.encoded(named[name], embeds[0])
        return embeds

    @property
    def adapter_names(self) -> set[str]:
        """The adapters that it serves."""
        return {*self.switches} | ({self.prefix.adapter_name} if self.prefix else set())

    def drop(self, adapter_name: str) -> None:
        """Forget an adapter; with the last one goes the encoder."""
        if self.prefix is not None and self.prefix.adapter_name == adapter_name:
            self.prefix = None
        if switch := self.switches.pop(adapter_name, None):
            switch.detach()
        if self.prefix is None and not self.switches:
            del self.pipe.encode_prompt

    def _with_prefix(self, prompts: list[str], named: dict[str, list[bool]]) -> list[str]:
        prefix = self.prefix
        if prefix is None or not prefix.on:
            return prompts
        off = named.get(prefix.adapter_name, [False] * len(prompts))
        return [
            prompt if is_off else prefix.before(prompt)
            for prompt, is_off in zip(prompts, off, strict=True)
        ]

    def _check_needs_no_text(self) -> None:
        """Embeddings do not tell what was said."""
        if self.prefix is not None and self.prefix.on:
            raise ValueError(
                f"the soft tokens of the adapter '{self.prefix.adapter_name}' cannot be put before "
                "prompt_embeds: pass the prompt as text, or set the adapter's scale to 0"
            )
        if on := [name for name, switch in self.switches.items() if switch.on]:
            raise ValueError(
                f"the adapter '{on[0]}' is to respect words, and prompt_embeds do not tell them: "
                "pass the prompt as text, set the adapter's scale to 0, or load it without "
                "respect_words"
            )


def prompt_encoder(pipe: Any) -> PromptEncoder | None:
    """Return what has taken the place of a pipeline's `encode_prompt`, if something has."""
    method = vars(pipe).get("encode_prompt")
    return method if isinstance(method, PromptEncoder) else None


def ensure_prompt_encoder(pipe: Any) -> PromptEncoder:
    """Return a pipeline's prompt encoder, put there if need be."""
    found = prompt_encoder(pipe)
    if found is None:
        found = pipe.encode_prompt = PromptEncoder(pipe)
    return found


def prompt_prefix(pipe: Any) -> PromptPrefix | None:
    """Return the prefix of a pipeline's prompts, if it has one."""
    encoder = prompt_encoder(pipe)
    return None if encoder is None else encoder.prefix


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
