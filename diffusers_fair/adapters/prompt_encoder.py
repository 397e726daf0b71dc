"""Wraps the method of a pipeline that encodes prompts, once for all adapters."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

from diffusers_fair.adapters.layers import is_fused_into, strengths
from diffusers_fair.adapters.prefix import PromptPrefix
from diffusers_fair.adapters.word_switch import WordSwitch
from diffusers_fair.families import family_of

_PROMPTS = ("prompt", "prompt_2", "prompt_3")  # by text encoder, where a pipeline takes several


class PromptEncoder:
    """Replaces a pipeline's method that encodes prompts, to apply adapters to the prompts.

    Soft tokens precede the prompts, but not the negative prompts. Adapters that respect words are
    off for prompts that contain such words, and for the negative prompts of these.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.prefix: PromptPrefix | None = None
        self.switches: dict[str, WordSwitch] = {}
        """Name of an adapter that respects words -> its switch."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the pipeline's class does, from the same arguments.

        Raises:
            ValueError: embeddings are given instead of a prompt, an adapter that has to be switched
                off for a prompt is fused into the weights or compiled, or only a part of an adapter
                with soft tokens is on.
        """
        encode = getattr(type(self.pipe), _method(self.pipe))
        call = inspect.signature(encode).bind(self.pipe, *args, **kwargs)
        if call.arguments.get("prompt_embeds") is not None:
            self._check_needs_no_text()
            return encode(*call.args, **call.kwargs)
        texts = {
            name: prompt if isinstance(prompt, list) else [prompt]
            for name in _PROMPTS
            if (prompt := call.arguments.get(name)) is not None
        }
        # a word in one of the texts for several text encoders names a class, too
        prompts = ["\n".join(parts) for parts in zip_longest(*texts.values(), fillvalue="")]
        named = {name: self._named(name, prompts) for name in self.switches}
        for name, listed in texts.items():
            prefixed = self._with_prefix(listed, named)
            is_list = isinstance(call.arguments[name], list)
            call.arguments[name] = prefixed if is_list else prefixed[0]
        with ExitStack() as stack:
            for name, switch in self.switches.items():
                stack.enter_context(switch.encoding(named[name]))
            embeds = encode(*call.args, **call.kwargs)
        for name, switch in self.switches.items():
            switch.encoded(named[name], embeds[0])
        return embeds

    @property
    def adapter_names(self) -> set[str]:
        """Names of the adapters that use it."""
        return {*self.switches} | ({self.prefix.adapter_name} if self.prefix else set())

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter; after the last one, restore the pipeline's method."""
        if self.prefix is not None and self.prefix.adapter_name == adapter_name:
            self.prefix = None
        if switch := self.switches.pop(adapter_name, None):
            switch.detach()
        if self.prefix is None and not self.switches:
            vars(self.pipe).pop(_method(self.pipe), None)  # a shallow copy may have removed it

    def _is_on(self, adapter_name: str) -> bool:
        prefix = self.prefix
        has_prefix = prefix is not None and prefix.adapter_name == adapter_name and prefix.is_on()
        is_fused = is_fused_into(self.pipe, adapter_name)
        return has_prefix or is_fused or any(map(any, strengths(self.pipe, adapter_name).values()))

    def _named(self, adapter_name: str, prompts: list[str]) -> list[bool]:
        """Return for each prompt whether the adapter has to be switched off for it."""
        if not self._is_on(adapter_name):
            return [False] * len(prompts)
        switch = self.switches[adapter_name]
        switch.attach(self.pipe)
        return switch.named(self.pipe, prompts)

    def _with_prefix(self, prompts: list[str], named: dict[str, list[bool]]) -> list[str]:
        prefix = self.prefix
        if prefix is None or not prefix.is_on():
            return prompts
        off = named.get(prefix.adapter_name, [False] * len(prompts))
        return [
            prompt if is_off else prefix.before(prompt)
            for prompt, is_off in zip(prompts, off, strict=True)
        ]

    def _check_needs_no_text(self) -> None:
        """Refuse embeddings if an adapter has to read or to change the prompt."""
        if self.prefix is not None and self.prefix.is_on():
            raise ValueError(
                f"the soft tokens of the adapter '{self.prefix.adapter_name}' cannot be put before "
                "prompt_embeds: pass the prompt as text, or set the adapter's scale to 0"
            )
        if on := [name for name in self.switches if self._is_on(name)]:
            raise ValueError(
                f"the adapter '{on[0]}' respects words, which prompt_embeds do not contain: "
                "pass the prompt as text, set the adapter's scale to 0, or load it without "
                "respect_words"
            )


def prompt_encoder(pipe: Any) -> PromptEncoder | None:
    """Return the prompt encoder of a pipeline, if it has one."""
    method = vars(pipe).get(_method(pipe))
    return method if isinstance(method, PromptEncoder) else None


def ensure_prompt_encoder(pipe: Any) -> PromptEncoder:
    """Return the prompt encoder of a pipeline, after adding one if it has none."""
    encoder = prompt_encoder(pipe)
    if encoder is None:
        encoder = PromptEncoder(pipe)
        setattr(pipe, _method(pipe), encoder)
    return encoder


def prompt_prefix(pipe: Any) -> PromptPrefix | None:
    """Return the prefix of a pipeline's prompts, if it has one."""
    encoder = prompt_encoder(pipe)
    return None if encoder is None else encoder.prefix


@contextmanager
def without_prefix(pipe: Any) -> Iterator[None]:
    """Encode the pipeline's prompts without the prefix within a `with` block."""
    encoder = prompt_encoder(pipe)
    if encoder is None:
        yield
        return
    prefix, encoder.prefix = encoder.prefix, None
    try:
        yield
    finally:
        encoder.prefix = prefix


def _method(pipe: Any) -> str:
    """Name of the method that encodes prompts."""
    return family_of(pipe).encode_method
