"""The word switch: images of prompts that name a class are generated without the adapter.

A LoRA layer adds its output to that of the base model's layer. A hook sets the output to zero for
some rows of the batch, so that these rows are bit for bit those of the base model. It does not
affect other adapters or other rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.adapters.layers import adapter_layers, is_compiled, is_fused_into, lora_models
from diffusers_fair.families.base import Family
from diffusers_fair.prompts.groups import classes_named, vocabulary
from diffusers_fair.prompts.wording import attribute_sections, recipe_wording

_Vocabulary = dict[str, dict[str, tuple[str, ...]]]
"""Attribute -> class -> words that name it."""


class _RowMask:
    """Zeroes the output of LoRA layers of one model for some rows of its batches."""

    rows: Tensor | None = None
    """(n,), True for rows without the adapter; None if there are none. Batches have a multiple of n
    rows."""

    def zero_output(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of the last module of a LoRA layer."""
        if self.rows is None:
            return None
        rows = self.rows.to(output.device).repeat(len(output) // len(self.rows))
        return output.masked_fill(rows.view(-1, *[1] * (output.ndim - 1)), 0)


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a batch of images."""

    named: Tensor | None
    """(m,), whether the prompt names a class; None if no prompt does."""
    embeds: Tensor
    """Embeddings of the prompts, (m, L, d)."""

    def are_named_in(self, given: Tensor) -> bool:
        """Whether a prompt names a class, and a call of the denoiser has these embeddings."""
        if self.named is None or len(given) % len(self.embeds):
            return False
        embeds = self.embeds.to(given)
        # [negative prompts, prompts] under guidance
        return any(torch.equal(block, embeds) for block in given.split(len(embeds)))


class _DenoiserRowMask(_RowMask):
    """A mask for a denoiser, which recognises its rows by the prompt embeddings of the call.

    Other pipelines that share the denoiser have other embeddings, so they keep the adapter. A
    pipeline whose callback changes the embeddings between two steps keeps it, too.

    Args:
        family: the pipeline's family, which finds the embeddings in a call of the denoiser.
    """

    prompts: _Prompts | None = None
    """The prompts that were encoded last."""
    earlier: _Prompts | None = None
    """Those that were encoded before them."""

    def __init__(self, family: Family):
        self.family = family

    def set_prompts(self, named: Tensor | None, embeds: Tensor) -> None:
        """Remember the prompts of the next images."""
        self.prompts, self.earlier = _Prompts(named, embeds.detach()), self.prompts

    def find_rows(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the denoiser; under guidance each prompt has several rows.

        Raises:
            ValueError: a prompt names a class, and its negative prompt was encoded apart from it.
        """
        self.rows = None
        if self.prompts is None:
            return
        given = self.family.prompt_embeddings(args, kwargs)
        if self.prompts.are_named_in(given):
            assert self.prompts.named is not None
            self.rows = self.prompts.named.to(given.device)
        elif (
            not self.family.takes_negative_prompts
            and self.earlier is not None
            and self.earlier.are_named_in(given)
        ):
            raise ValueError(
                f"respect_words cannot switch the adapter off for the negative prompts of "
                f"{self.family.name}, which the pipeline encodes after the prompts: leave out "
                "negative_prompt, or load the adapter without respect_words"
            )


class WordSwitch:
    """Switches an adapter off for prompts that name a class of an attribute that it balances.

    Args:
        adapter_name: the adapter.
        words: words that name the classes.
        family: the family of the pipeline.
    """

    def __init__(self, adapter_name: str, words: _Vocabulary, family: Family):
        self.adapter_name = adapter_name
        self.words = words
        self.family = family
        self.encoder_mask, self.denoiser_mask = _RowMask(), _DenoiserRowMask(family)
        self._layers: list[Any] = []  # those with hooks
        self._handles: list[Any] = []

    def attach(self, pipe: Any) -> None:
        """Add hooks to the adapter's layers; again if the pipeline has got other ones."""
        by_component = adapter_layers(pipe, self.adapter_name)
        layers = [layer for found in by_component.values() for layer in found]
        if layers == self._layers:
            return
        self.detach()
        self._layers = layers
        if self.family.denoiser in by_component:
            denoiser = lora_models(pipe)[self.family.denoiser]
            hook = denoiser.register_forward_pre_hook(
                self.denoiser_mask.find_rows, with_kwargs=True
            )
            self._handles.append(hook)
        for name, found in by_component.items():
            mask = self.denoiser_mask if name == self.family.denoiser else self.encoder_mask
            for layer in found:
                last = layer.lora_B[self.adapter_name]
                self._handles.append(last.register_forward_hook(mask.zero_output))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers = []

    def named(self, pipe: Any, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it names a class, which disables the adapter.

        Raises:
            ValueError: a prompt names a class, and the adapter is fused into the weights or
                compiled.
        """
        named = [bool(classes_named(prompt, self.words)) for prompt in prompts]
        if not any(named):
            return named
        if is_fused_into(pipe, self.adapter_name):
            raise ValueError(
                f"the adapter '{self.adapter_name}' respects words, but it is fused into the "
                "pipeline's weights and cannot be switched off for one prompt: call "
                "pipe.unfuse_lora() first"
            )
        if self._layers:
            check_not_compiled(pipe)
        return named

    @contextmanager
    def encoding(self, named: Sequence[bool]) -> Iterator[None]:
        """Mask the text encoder's layers while these prompts and their negatives are encoded."""
        self.encoder_mask.rows = torch.tensor(named) if any(named) else None
        try:
            yield
        finally:
            self.encoder_mask.rows = None

    def encoded(self, named: Sequence[bool], embeds: Tensor) -> None:
        """Pass the prompts' embeddings (m, L, d) on to the denoiser's mask.

        Each prompt has one row or more.
        """
        images_per_prompt = len(embeds) // len(named)
        rows = torch.tensor(named).repeat_interleave(images_per_prompt)
        self.denoiser_mask.set_prompts(rows if any(named) else None, embeds)


def check_not_compiled(pipe: Any) -> None:
    """Refuse compiled models: `torch.compile` shares code between models with and without hooks.

    Raises:
        ValueError: a model that can have LoRA layers is compiled.
    """
    if is_compiled(pipe):
        raise ValueError(
            "respect_words has no effect on LoRA layers in a compiled model: load the adapter "
            "without respect_words, or do not compile the pipeline"
        )


def adapter_words(info: AdapterInfo) -> _Vocabulary:
    """Return the words that name an adapter's classes.

    Older folders do not contain them: their words come from the recipe and the lexicon.
    """
    if info.words:
        return {name: dict(by_class) for name, by_class in info.words.items()}
    sections = attribute_sections(info.recipe)
    return vocabulary([recipe_wording(a, sections) for a in info.attributes])
