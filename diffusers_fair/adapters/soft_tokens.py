"""Soft tokens: trainable input embeddings that stand before the prompt, after the start token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.prefix import PromptPrefix
from diffusers_fair.adapters.prompt_encoder import ensure_prompt_encoder, prompt_prefix

# ---- in training ---------------------------------------------------------------------------------


class SoftTokenEmbedding(nn.Module):
    """A token embedding whose vocabulary goes on with trainable rows.

    Ids below the size of the vocabulary are looked up there, the ids after it are the soft tokens:
    the ids that they get when they are loaded as a textual inversion.

    Args:
        vocabulary: the text encoder's own embedding; used as it is.
        rows: of the vocabulary to start from.
    """

    def __init__(self, vocabulary: nn.Embedding, rows: Tensor):
        super().__init__()
        start = vocabulary.weight.detach()[rows.to(vocabulary.weight.device)]  # (m, d)
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.vocabulary = vocabulary  # the first: hosts take their dtype from the first parameter
        self.soft = nn.Embedding.from_pretrained(start.to(dtype, copy=True), freeze=False)

    @property
    def tokens(self) -> nn.Parameter:
        """The soft tokens, (m, d), in float32 or better."""
        return self.soft.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids, (n, L) -> (n, L, d)."""
        soft = ids >= self.vocabulary.num_embeddings
        fixed = self.vocabulary(ids.masked_fill(soft, 0))
        if not soft.any():  # the empty prompt of guidance: not trainable
            return fixed
        rows = (ids - self.vocabulary.num_embeddings).clamp(min=0)
        trained = functional.embedding(rows, self.tokens).to(fixed.dtype)
        return torch.where(soft[..., None], trained, fixed)


def add_soft_tokens(
    pipe: Any,
    count: int,
    generator: torch.Generator,
    *,
    token: str = "<fair>",
    adapter_name: str = "fair",
) -> nn.Parameter:
    """Freeze the text encoder and put trainable soft tokens before every prompt it encodes.

    Args:
        pipe: a Stable Diffusion pipeline.
        count: m, number of soft tokens.
        generator: on the CPU; draws the rows of the vocabulary that they start from.
        token: the placeholder that stands for them all.
        adapter_name: the adapter that they belong to.

    Returns:
        The soft tokens, (m, d).

    Raises:
        ValueError: the pipeline cannot have them, see `check_soft_tokens`.
    """
    tokens = SoftTokens(count=count, token=token)
    check_soft_tokens(pipe, tokens)
    pipe.text_encoder.requires_grad_(False)
    vocabulary = pipe.text_encoder.get_input_embeddings()
    rows = torch.randint(vocabulary.num_embeddings, (count,), generator=generator)
    embedding = SoftTokenEmbedding(vocabulary, rows)
    pipe.tokenizer.add_tokens(list(tokens.names))
    pipe.text_encoder.set_input_embeddings(embedding)
    ensure_prompt_encoder(pipe).prefix = PromptPrefix(pipe, tokens, adapter_name)
    return embedding.tokens


def soft_tokens(text_encoder: Any) -> nn.Parameter:
    """Return the trainable soft tokens of a text encoder that has some, (m, d)."""
    embedding = text_encoder.get_input_embeddings()
    assert isinstance(embedding, SoftTokenEmbedding)
    return embedding.tokens


def check_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Refuse soft tokens that a pipeline cannot have.

    Raises:
        ValueError: the prompt has no room for so many, their names are taken, there are soft tokens
            already, or the pipeline's prompts cannot be given a prefix.
    """
    if not (hasattr(type(pipe), "encode_prompt") and hasattr(type(pipe), "load_textual_inversion")):
        raise ValueError(
            f"soft tokens need a pipeline with encode_prompt and load_textual_inversion, and "
            f"{type(pipe).__name__} is none"
        )
    room = pipe.tokenizer.model_max_length - 2  # start and end
    if tokens.count > room:
        raise ValueError(f"a prompt has room for 1 to {room} soft tokens, got {tokens.count}")
    if (prefix := prompt_prefix(pipe)) is not None:
        raise ValueError(
            f"the pipeline has soft tokens already, those of the adapter '{prefix.adapter_name}', "
            "and a prefix is trained to stand alone before the prompt: unload that adapter first"
        )
    vocabulary = pipe.tokenizer.get_vocab()
    if taken := [name for name in tokens.names if name in vocabulary]:
        raise ValueError(
            f"the pipeline's tokenizer has a token '{taken[0]}' already: unload that textual "
            "inversion first"
        )
    rows = pipe.text_encoder.get_input_embeddings().num_embeddings
    if rows != len(pipe.tokenizer):  # new rows would not get the ids of the new tokens
        raise ValueError(
            f"soft tokens need a text encoder with one embedding for each of the tokenizer's "
            f"{len(pipe.tokenizer)} tokens, this one has {rows}"
        )


# ---- trained ones, in and out of a pipeline ------------------------------------------------------


def load_soft_tokens(pipe: Any, tokens: SoftTokens, weight: Tensor, adapter_name: str) -> None:
    """Put trained soft tokens into a pipeline as a textual inversion, and before every prompt.

    Upon any error the pipeline is as it was.

    Args:
        pipe: a pipeline that `check_soft_tokens` accepts them for.
        tokens: what they are called.
        weight: their embeddings, (m, d).
        adapter_name: the adapter that they belong to.
    """
    rows = pipe.text_encoder.get_input_embeddings().weight.data  # stays whole: hosts make a new one
    try:
        with _random_state_kept(pipe):
            pipe.load_textual_inversion({tokens.token: weight})
        ensure_prompt_encoder(pipe).prefix = PromptPrefix(pipe, tokens, adapter_name)
    except BaseException:
        unload_soft_tokens(pipe, tokens)
        _set_rows(pipe, rows)
        raise


def unload_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Take soft tokens, or those of them that are there, out again; other added tokens stay."""
    from transformers import CLIPTokenizer

    vocabulary = pipe.tokenizer.get_vocab()
    names = [name for name in tokens.names if name in vocabulary]
    if not names:
        return
    embedding = pipe.text_encoder.get_input_embeddings()
    with _random_state_kept(pipe):
        pipe.unload_textual_inversion(names)
    rows = pipe.text_encoder.get_input_embeddings().weight.data
    pipe.text_encoder.set_input_embeddings(embedding)  # the host made a new one, of other settings
    _set_rows(pipe, rows)
    if isinstance(pipe.tokenizer, CLIPTokenizer):  # the host forgot how it decodes
        pipe.tokenizer._wrap_decode_method_backend_tokenizer()


def _set_rows(pipe: Any, rows: Tensor) -> None:
    """Give the text encoder's embedding other rows, (V, d)."""
    pipe.text_encoder.get_input_embeddings().weight.data = rows
    pipe.text_encoder.resize_token_embeddings(len(rows))  # the sizes that it has noted down


@contextmanager
def _random_state_kept(pipe: Any) -> Iterator[None]:
    """Hosts draw numbers for embeddings that they overwrite at once."""
    device = pipe.text_encoder.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
