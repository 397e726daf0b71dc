"""Soft tokens: trainable input embeddings that precede the prompt, after the start token."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_fair.adapters.format import SoftTokens
from diffusers_fair.adapters.prefix import LoadedPrefix, PromptPrefix
from diffusers_fair.adapters.prompt_encoder import ensure_prompt_encoder, prompt_prefix
from diffusers_fair.families import embedding_keys, family_of, soft_token_encoders

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
) -> dict[str, nn.Parameter]:
    """Freeze the text encoders and add trainable soft tokens before every prompt they encode.

    Args:
        pipe: a pipeline of a known family.
        count: m, number of soft tokens.
        generator: a CPU generator, for the rows of the vocabulary that they are initialized with.
        token: placeholder for all of them in a prompt.
        adapter_name: adapter that they belong to.

    Returns:
        Key in the adapter folder -> the soft tokens of one text encoder, (m, d).

    Raises:
        ValueError: the pipeline cannot have them, see `check_soft_tokens`.
    """
    tokens = SoftTokens(count=count, token=token)
    check_soft_tokens(pipe, tokens)
    for encoder, tokenizer in soft_token_encoders(pipe).values():
        encoder.requires_grad_(False)
        vocabulary = encoder.get_input_embeddings()
        rows = torch.randint(vocabulary.num_embeddings, (count,), generator=generator)
        tokenizer.add_tokens(list(tokens.names))
        encoder.set_input_embeddings(_SoftTokenEmbedding(vocabulary, rows))
    ensure_prompt_encoder(pipe).prefix = PromptPrefix(pipe, tokens, adapter_name)
    return soft_tokens(pipe, token)


def soft_tokens(pipe: Any, token: str) -> dict[str, nn.Parameter]:
    """Return the trainable soft tokens that were added to a pipeline.

    Returns:
        Key in the adapter folder -> the soft tokens of one text encoder, (m, d).
    """
    encoders = soft_token_encoders(pipe)
    return {
        key: encoders[name][0].get_input_embeddings().tokens
        for name, key in embedding_keys(pipe, token).items()
    }


def check_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Refuse soft tokens that a pipeline cannot have.

    Raises:
        ValueError: too many for the prompt, names in use, other soft tokens in the pipeline, a
            family without them, or a pipeline whose prompts cannot have a prefix.
    """
    family = family_of(pipe)
    if not family.embedding_keys:
        raise ValueError(
            f"soft tokens are not available for {family.name}: use LoRA layers of "
            f"{' or '.join(family.targets)} instead"
        )
    method = family.encode_method
    if not (hasattr(type(pipe), method) and hasattr(type(pipe), "load_textual_inversion")):
        raise ValueError(
            f"soft tokens need a pipeline with {method} and load_textual_inversion, and "
            f"{type(pipe).__name__} is none"
        )
    if (prefix := prompt_prefix(pipe)) is not None:
        raise ValueError(
            f"the pipeline has soft tokens already, those of the adapter '{prefix.adapter_name}', "
            "and a prefix is trained to stand alone before the prompt: unload that adapter first"
        )
    for name, (encoder, tokenizer) in soft_token_encoders(pipe).items():
        _check_encoder(encoder, tokenizer, tokens)
        if name in family.pooled:
            _check_pooling(name, encoder, tokenizer)


def _check_encoder(encoder: Any, tokenizer: Any, tokens: SoftTokens) -> None:
    """Refuse soft tokens that one text encoder cannot have."""
    room = tokenizer.model_max_length - 2  # start and end
    if tokens.count > room:
        raise ValueError(f"a prompt has room for 1 to {room} soft tokens, got {tokens.count}")
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


def _check_pooling(name: str, encoder: Any, tokenizer: Any) -> None:
    """Refuse a CLIP text encoder that would pool at a soft token instead of the prompt's end."""
    if encoder.config.eos_token_id == 2:  # in many configs; transformers looks for it
        raise ValueError(
            f"soft tokens do not work with the {name} of this base: its config has eos_token_id 2, "
            "so that it pools a prompt at the token of the highest id, which is a soft token "
            "whatever the prompt is: use LoRA layers instead, or a base whose config.json has the "
            f"tokenizer's eos_token_id, {tokenizer.eos_token_id}"
        )


def check_embeddings(pipe: Any, tokens: SoftTokens, weights: Mapping[str, Tensor]) -> None:
    """Refuse trained soft tokens that do not fit the text encoders of a pipeline.

    Raises:
        ValueError: they are for other text encoders, or of another size.
    """
    encoders = soft_token_encoders(pipe)
    keys = embedding_keys(pipe, tokens.token)
    if missing := [key for key in keys.values() if key not in weights]:
        raise ValueError(
            f"the adapter has no soft tokens '{missing[0]}' for the text encoders of this "
            f"{type(pipe).__name__}: load it into a pipeline of its own family"
        )
    for name, key in keys.items():
        width = encoders[name][0].get_input_embeddings().embedding_dim
        if (got := weights[key].shape[1]) != width:
            raise ValueError(
                f"the adapter's soft tokens have {got} dimensions, but the embeddings of this "
                f"pipeline's {name} have {width}"
            )


# ---- trained soft tokens -------------------------------------------------------------------------


def load_soft_tokens(
    pipe: Any,
    tokens: SoftTokens,
    weights: Mapping[str, Tensor],
    adapter_name: str,
    components: Collection[str] = (),
) -> None:
    """Load trained soft tokens into a pipeline as a textual inversion, and prefix every prompt.

    After an error, the pipeline is unchanged.

    Args:
        pipe: a pipeline that `check_soft_tokens` accepts.
        tokens: number and placeholder of the soft tokens.
        weights: weights of the adapter, which `check_embeddings` accepts.
        adapter_name: adapter that they belong to.
        components: components of the pipeline in which the adapter has LoRA layers, too.
    """
    encoders, keys = soft_token_encoders(pipe), embedding_keys(pipe, tokens.token)
    # they stay intact, as transformers makes new ones
    rows = [encoder.get_input_embeddings().weight.data for encoder, _ in encoders.values()]
    try:
        with _preserve_random_state(pipe):
            for name, (encoder, tokenizer) in encoders.items():
                weight = {tokens.token: weights[keys[name]]}
                pipe.load_textual_inversion(weight, None, tokenizer, encoder)
        prefix = LoadedPrefix(pipe, tokens, adapter_name, components)
        ensure_prompt_encoder(pipe).prefix = prefix
    except BaseException:
        unload_soft_tokens(pipe, tokens)
        for (encoder, _), before in zip(encoders.values(), rows, strict=True):
            _set_rows(encoder, before)
        raise


def unload_soft_tokens(pipe: Any, tokens: SoftTokens) -> None:
    """Remove soft tokens, even if only some of them were added."""
    for encoder, tokenizer in soft_token_encoders(pipe).values():
        _unload_from(pipe, encoder, tokenizer, tokens)


def _unload_from(pipe: Any, encoder: Any, tokenizer: Any, tokens: SoftTokens) -> None:
    """Remove soft tokens from one text encoder."""
    from transformers import CLIPTokenizer

    vocabulary = tokenizer.get_vocab()
    names = [name for name in tokens.names if name in vocabulary]
    embedding = encoder.get_input_embeddings()
    if not names:  # the user has unloaded them, or replaced the tokenizer
        if embedding.num_embeddings > len(tokenizer):
            _set_rows(encoder, embedding.weight.data[: len(tokenizer)].clone())
        return
    with _preserve_random_state(pipe):
        pipe.unload_textual_inversion(names, tokenizer, encoder)
    rows = encoder.get_input_embeddings().weight.data
    encoder.set_input_embeddings(embedding)  # the new one has other settings
    _set_rows(encoder, rows)
    if isinstance(tokenizer, CLIPTokenizer):  # unloading dropped its wrapper
        tokenizer._wrap_decode_method_backend_tokenizer()


def _set_rows(encoder: Any, rows: Tensor) -> None:
    """Replace the rows of a text encoder's embedding, (V, d)."""
    encoder.get_input_embeddings().weight.data = rows
    encoder.resize_token_embeddings(len(rows))  # updates the sizes in its config


@contextmanager
def _preserve_random_state(pipe: Any) -> Iterator[None]:
    """Restore torch's random state, which transformers advances to initialize new embeddings."""
    devices = {encoder.device for encoder, _ in soft_token_encoders(pipe).values()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        yield
