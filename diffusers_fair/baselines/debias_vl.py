"""debiasVL: a calibrated projection of the prompt embeddings.

Chuang, Jampani, Li, Torralba, Jegelka: Debiasing vision-language models via biased prompts, 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task, require
from diffusers_fair.families import family_of
from diffusers_fair.families.stable_diffusion import (
    STABLE_DIFFUSION,
    guided_embeddings,
    token_embeddings,
)
from diffusers_fair.prompts.wording import Wording, with_terms
from diffusers_fair.prompts.wording import combinations as combined


@dataclass(frozen=True)
class DebiasVL(Baseline):
    """Makes the embeddings of prompts that differ only in the attributes similar."""

    strength: float = 500.0
    """lambda: weight of the similarity relative to staying near the identity."""

    def check(self, pipe: Any) -> None:
        """Require a single text encoder, as in the paper."""
        works = family_of(pipe) is STABLE_DIFFUSION
        require(works, "debias-vl", "projects the tokens of a single text encoder", pipe)

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Project the embeddings of all prompts except negative prompts."""
        self.check(pipe)
        first, second = (
            F.normalize(_last_tokens(pipe, texts).cpu().double(), dim=-1)
            for texts in pairs(task.prompts, task.wordings)
        )  # (m, d) each
        projection = calibration(first - second, self.strength)  # (d, d)

        def generate(prompts, generators, negative_prompt=None, **options):
            plain, negative = guided_embeddings(pipe, prompts, negative_prompt)  # (n, L, d) each
            return pipe(
                prompt_embeds=plain @ projection.T.to(plain),
                negative_prompt_embeds=negative,
                generator=generators,
                **options,
            )

        return ChangedPipeline(pipe, generate)


def calibration(differences: Tensor, strength: float) -> Tensor:
    """Return the minimiser P of |P - I|^2 + lambda / m * sum over pairs |P z_i - P z_j|^2.

    It is (I + lambda / m * sum (z_i - z_j)(z_i - z_j)^T)^-1: the paper's calibration without the
    first projection P_0, which the paper's text-to-image experiments leave out.

    Args:
        differences: z_i - z_j of m pairs, (m, d).
        strength: lambda.

    Returns:
        (d, d), symmetric.
    """
    spread = differences.T @ differences / len(differences)  # (d, d)
    return torch.linalg.inv(torch.eye(len(spread)).to(spread) + strength * spread)


def pairs(prompts: Sequence[str], wordings: Sequence[Wording]) -> tuple[list[str], list[str]]:
    """Pair each prompt with every two combinations of words: one version in each list."""
    terms = [words for words, _ in combined(wordings)]
    both = [
        (with_terms(p, a), with_terms(p, b)) for p in prompts for a, b in combinations(terms, 2)
    ]
    return [a for a, _ in both], [b for _, b in both]


def _last_tokens(pipe: Any, texts: Sequence[str], batch: int = 64) -> Tensor:
    """Return the embeddings of the texts' end tokens, (m, d)."""
    known: dict[str, Tensor] = {}
    unique = list(dict.fromkeys(texts))
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        embeddings = token_embeddings(pipe, part)  # (b, L, d)
        limit = pipe.tokenizer.model_max_length
        ends = [
            len(ids) - 1
            for ids in pipe.tokenizer(part, truncation=True, max_length=limit).input_ids
        ]
        known |= dict(zip(part, embeddings[range(len(part)), ends], strict=True))
    return torch.stack([known[text] for text in texts])
