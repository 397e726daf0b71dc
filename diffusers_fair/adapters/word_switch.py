"""The word switch: prompts that name a class are drawn without the adapter, one by one.

Low-rank layers add their output to that of the base model's layer. A hook sets it to zero for some
rows of the batch, which gives these rows the base model's numbers to the bit. Other adapters, and
the other rows, do not notice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusers_fair.adapters.format import AdapterInfo
from diffusers_fair.prompts.groups import classes_named, vocabulary
from diffusers_fair.prompts.wording import attribute_sections, recipe_wording

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Vocabulary = dict[str, dict[str, tuple[str, ...]]]
"""Attribute -> class -> words that name it."""


class RowMask:
    """Silences the low-rank layers of one model for some rows of its batches."""

    rows: Tensor | None = None
    """(n,), True where the adapter is off; None is nowhere. Batches have a multiple of n rows."""

    def silence(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of the last module of a low-rank layer."""
        if self.rows is None:
            return None
        rows = self.rows.to(output.device).repeat(len(output) // len(self.rows))
        return output.masked_fill(rows.view(-1, *[1] * (output.ndim - 1)), 0)


class UNetRowMask(RowMask):
    """The same for a U-Net, whose rows are known by the prompt embeddings that they are given.

    Pipelines that share the U-Net have embeddings of their own, and keep the adapter. So does a
    pipeline whose callback changes the embeddings between two steps.
    """

    named: Tensor | None = None
    """(m,), whether the prompt names a class; None if no prompt does."""
    embeds: Tensor
    """Embeddings of the prompts, (m, L, d)."""

    def note(self, named: Tensor | None, embeds: Tensor) -> None:
        """Take the prompts of the images to come."""
        self.named, self.embeds = named, embeds.detach()

    def find_rows(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the U-Net; guidance gives it several rows for each prompt."""
        self.rows = None
        if self.named is None:
            return
        hidden = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        embeds = self.embeds.to(hidden)
        blocks = hidden.split(len(embeds))  # [negative prompts, prompts] under guidance
        if len(hidden) % len(embeds) == 0 and any(torch.equal(block, embeds) for block in blocks):
            self.rows = self.named.to(hidden.device)


class WordSwitch:
    """Switches an adapter off for the prompts that name a class of what it balances.

    Args:
        adapter_name: the adapter.
        words: that name the classes.
    """

    def __init__(self, adapter_name: str, words: Vocabulary):
        self.adapter_name = adapter_name
        self.words = words
        self.on = True
        self.text_encoder, self.unet = RowMask(), UNetRowMask()
        self._layers: list[LoraLayer] = []
        self._handles: list[Any] = []

    def attach(self, part: str, model: nn.Module, layers: "Sequence[LoraLayer]") -> None:
        """Put hooks on the adapter's layers in one part of the pipeline."""
        mask = self.unet if part == "unet" else self.text_encoder
        if part == "unet":
            hook = model.register_forward_pre_hook(self.unet.find_rows, with_kwargs=True)
            self._handles.append(hook)
        for layer in layers:
            last = layer.lora_B[self.adapter_name]
            self._handles.append(last.register_forward_hook(mask.silence))
        self._layers += layers

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def named(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is to be drawn without the adapter.

        Raises:
            ValueError: one is, and the adapter is fused into the weights.
        """
        found = [self.on and bool(classes_named(prompt, self.words)) for prompt in prompts]
        fused = any(self.adapter_name in layer.merged_adapters for layer in self._layers)
        if fused and any(found):
            raise ValueError(
                f"the adapter '{self.adapter_name}' is to respect words, and fused into the "
                "pipeline's weights it cannot be switched off for one prompt: call "
                "pipe.unfuse_lora() first"
            )
        return found

    @contextmanager
    def encoding(self, named: Sequence[bool]) -> Iterator[None]:
        """Silence the text encoder's layers while these prompts and their negatives are encoded."""
        self.text_encoder.rows = torch.tensor(named) if any(named) else None
        try:
            yield
        finally:
            self.text_encoder.rows = None

    def encoded(self, named: Sequence[bool], embeds: Tensor) -> None:
        """Note for the U-Net what became of the prompts, each one or more rows of (m, L, d)."""
        each = len(embeds) // len(named)  # images per prompt
        rows = torch.tensor(named).repeat_interleave(each)
        self.unet.note(rows if any(named) else None, embeds)


def adapter_words(info: AdapterInfo) -> Vocabulary:
    """Words that name an adapter's classes; those of its recipe and of English in older folders."""
    if info.words:
        return {name: dict(by_class) for name, by_class in info.words.items()}
    sections = attribute_sections(info.recipe)
    return vocabulary([recipe_wording(each, sections) for each in info.attributes])
