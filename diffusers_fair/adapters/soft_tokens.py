"""Soft tokens: trainable input embeddings that stand before the prompt, after the start token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        self.vocabulary = vocabulary
        start = vocabulary.weight.detach()[rows.to(vocabulary.weight.device)]  # (m, d)
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.tokens = nn.Parameter(start.to(dtype, copy=True))

    @property
    def ids(self) -> Tensor:
        """Ids of the soft tokens, (m,)."""
        return torch.arange(len(self.tokens)) + self.vocabulary.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids, (n, L) -> (n, L, d)."""
        soft = ids >= self.vocabulary.num_embeddings
        fixed = self.vocabulary(ids.masked_fill(soft, 0))
        if not soft.any():  # the empty prompt of guidance: not trainable
            return fixed
        rows = (ids - self.vocabulary.num_embeddings).clamp(min=0)
        trained = functional.embedding(rows, self.tokens).to(fixed.dtype)
        return torch.where(soft[..., None], trained, fixed)


def add_soft_tokens(pipe: Any, count: int, generator: torch.Generator) -> nn.Parameter:
    """Freeze the text encoder and put soft tokens before every prompt it encodes.

    Args:
        pipe: a Stable Diffusion pipeline.
        count: m, number of soft tokens.
        generator: on the CPU; draws the rows of the vocabulary that they start from.

    Returns:
        The soft tokens, (m, d).

    Raises:
        ValueError: the prompt has no room for so many, or there are soft tokens already.
    """
    room = pipe.tokenizer.model_max_length - 2  # start and end
    if not 1 <= count <= room:
        raise ValueError(f"a prompt has room for 1 to {room} soft tokens, got {count}")
    if soft_tokens(pipe.text_encoder) is not None:
        raise ValueError("the text encoder has soft tokens already: remove_soft_tokens first")
    pipe.text_encoder.requires_grad_(False)
    vocabulary = pipe.text_encoder.get_input_embeddings()
    rows = torch.randint(vocabulary.num_embeddings, (count,), generator=generator)
    embedding = SoftTokenEmbedding(vocabulary, rows)
    pipe.text_encoder.set_input_embeddings(embedding)
    return embedding.tokens


def soft_tokens(text_encoder: nn.Module) -> SoftTokenEmbedding | None:
    """Return the embedding that holds a text encoder's soft tokens, if it has any."""
    embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    return embedding if isinstance(embedding, SoftTokenEmbedding) else None


def remove_soft_tokens(pipe: Any) -> None:
    """Give the text encoder its own embedding back.

    Raises:
        ValueError: it has no soft tokens.
    """
    embedding = soft_tokens(pipe.text_encoder)
    if embedding is None:
        raise ValueError("the text encoder has no soft tokens to remove")
    pipe.text_encoder.set_input_embeddings(embedding.vocabulary)
