"""Soft tokens: trainable input embeddings that precede the prompt, after the start token."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.prefix import LoadedPrefix, PromptPrefix
from diffusers_fair.adapters.prompt_encoder import ensure_prompt_encoder, prompt_prefix
from diffusers_fair.families import component, family_of

# ---- in training ---------------------------------------------------------------------------------


class _SoftTokenEmbedding(nn.Module):
    """A token embedding with additional trainable rows.

    Ids below the size of the vocabulary are looked up in it. The ids above it are the soft tokens;
    they have the same ids when they are loaded as a textual inversion.

    Args:
        vocabulary: the text encoder's original embedding, which is not copied.
        rows: rows of the vocabulary that the soft tokens start from, (m,).
    """

    def __init__(self, vocabulary: nn.Embedding, rows: Tensor):
        super().__init__()
        start = vocabulary.weight.detach()[rows.to(vocabulary.weight.device)]  # (m, d)
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.vocabulary = (
            vocabulary  # first, as transformers takes a model's dtype from its first parameter
        )
        self.soft = nn.Embedding.from_pretrained(start.to(dtype, copy=True), freeze=False)

    @property
    def tokens(self) -> nn.Parameter:
        """The soft tokens, (m, d), in float32 or better."""
        return self.soft.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids, (n, L) -> (n, L, d)."""
        soft = ids >= self.vocabulary.num_embeddings
        fixed = self.vocabulary(ids.masked_fill(soft, 0))
        if not soft.any():  # the empty prompt of guidance: nothing to train
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
    """Freeze the text encoder and add trainable soft tokens before every prompt it encodes.

    Args:
        pipe: a pipeline of a known family.
        count: m, number of soft tokens.
        generator: a CPU generator, for the rows of the vocabulary that they are initialized with.
        token: placeholder for all of them in a prompt.
        adapter_name: adapter that they belong to.

    Returns:
        The soft tokens, (m, d).

    Raises:
        ValueError: the pipeline cannot have them, see `check_soft_tokens`.
    """
    tokens = SoftTokens(count=count, token=token)
    check_soft_tokens(pipe, tokens)
    encoder, tokenizer = _encoder(pipe), _tokenizer(pipe)
    encoder.requires_grad_(False)
    vocabulary = encoder.get_input_embeddings()
    rows = torch.randint(vocabulary.num_embeddings, (count,), generator=generator)
    embedding = _SoftTokenEmbedding(vocabulary, rows)
    tokenizer.add_tokens(list(tokens.names))
    encoder.set_input_embeddings(embedding)
    ensure_prompt_encoder(pipe).prefix = PromptPrefix(pipe, tokens, adapter_name)
    return embedding.tokens


def soft_tokens(pipe: Any) -> nn.Parameter:
    """Return the trainable soft tokens (m, d) that were added to a pipeline."""
    embedding = _encoder(pipe).get_input_embeddings()
    assert isinstance(embedding, _SoftTokenEmbedding)
    return embedding.tokens


def check_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Refuse soft tokens that a pipeline cannot have.

    Raises:
        ValueError: too many for the prompt, names in use, other soft tokens in the pipeline, or a
            pipeline whose prompts cannot have a prefix.
    """
    method = family_of(pipe).encode_method
    if not (hasattr(type(pipe), method) and hasattr(type(pipe), "load_textual_inversion")):
        raise ValueError(
            f"soft tokens need a pipeline with {method} and load_textual_inversion, and "
            f"{type(pipe).__name__} is none"
        )
    encoder, tokenizer = _encoder(pipe), _tokenizer(pipe)
    room = tokenizer.model_max_length - 2  # start and end
    if tokens.count > room:
        raise ValueError(f"a prompt has room for 1 to {room} soft tokens, got {tokens.count}")
    if (prefix := prompt_prefix(pipe)) is not None:
        raise ValueError(
            f"the pipeline has soft tokens already, those of the adapter '{prefix.adapter_name}', "
            "and a prefix is trained to stand alone before the prompt: unload that adapter first"
        )
    vocabulary = tokenizer.get_vocab()
    if taken := [name for name in tokens.names if name in vocabulary]:
        raise ValueError(
            f"the pipeline's tokenizer has a token '{taken[0]}' already: unload that textual "
            "inversion first"
        )
    rows = encoder.get_input_embeddings().num_embeddings
    if rows != len(tokenizer):  # new rows would not get the ids of the new tokens
        raise ValueError(
            f"soft tokens need a text encoder with one embedding for each of the tokenizer's "
            f"{len(tokenizer)} tokens, this one has {rows}"
        )


def embedding_width(pipe: Any) -> int:
    """Return the size d of the text encoder's input embeddings."""
    return _encoder(pipe).get_input_embeddings().embedding_dim


def _encoder(pipe: Any) -> Any:
    """The text encoder that can have soft tokens."""
    (name,) = family_of(pipe).inversions
    return component(pipe, name)


def _tokenizer(pipe: Any) -> Any:
    """The tokenizer of this text encoder."""
    (name,) = family_of(pipe).inversions.values()
    return getattr(pipe, name)


# ---- trained soft tokens -------------------------------------------------------------------------


def load_soft_tokens(
    pipe: Any,
    tokens: SoftTokens,
    weight: Tensor,
    adapter_name: str,
    components: Collection[str] = (),
) -> None:
    """Load trained soft tokens into a pipeline as a textual inversion, and prefix every prompt.

    After an error, the pipeline is unchanged.

    Args:
        pipe: a pipeline that `check_soft_tokens` accepts.
        tokens: number and placeholder of the soft tokens.
        weight: embeddings, (m, d).
        adapter_name: adapter that they belong to.
        components: components of the pipeline in which the adapter has LoRA layers, too.
    """
    rows = (
        _encoder(pipe).get_input_embeddings().weight.data
    )  # stays intact: transformers makes a new one
    try:
        with _preserve_random_state(pipe):
            pipe.load_textual_inversion({tokens.token: weight})
        prefix = LoadedPrefix(pipe, tokens, adapter_name, components)
        ensure_prompt_encoder(pipe).prefix = prefix
    except BaseException:
        unload_soft_tokens(pipe, tokens)
        _set_rows(pipe, rows)
        raise


def unload_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Remove soft tokens, even if only some of them were added."""
    from transformers import CLIPTokenizer

    encoder, tokenizer = _encoder(pipe), _tokenizer(pipe)
    vocabulary = tokenizer.get_vocab()
    names = [name for name in tokens.names if name in vocabulary]
    embedding = encoder.get_input_embeddings()
    if not names:  # the user has unloaded them, or replaced the tokenizer
        if embedding.num_embeddings > len(tokenizer):
            _set_rows(pipe, embedding.weight.data[: len(tokenizer)].clone())
        return
    with _preserve_random_state(pipe):
        pipe.unload_textual_inversion(names)
    rows = encoder.get_input_embeddings().weight.data
    encoder.set_input_embeddings(embedding)  # the new one has other settings
    _set_rows(pipe, rows)
    if isinstance(tokenizer, CLIPTokenizer):  # unloading dropped its wrapper
        tokenizer._wrap_decode_method_backend_tokenizer()


def _set_rows(pipe: Any, rows: Tensor) -> None:
    """Replace the rows of the text encoder's embedding, (V, d)."""
    _encoder(pipe).get_input_embeddings().weight.data = rows
    _encoder(pipe).resize_token_embeddings(len(rows))  # updates the sizes in its config


@contextmanager
def _preserve_random_state(pipe: Any) -> Iterator[None]:
    """Restore torch's random state, which transformers advances to initialize new embeddings."""
    device = _encoder(pipe).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
