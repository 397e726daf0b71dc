"""Concept algebra: the attributes' part of the score is replaced by that of a balanced mixture.

Wang, Gui, Negrea, Veitch: Concept algebra for (score-based) text-controlled generative models,
NeurIPS 2023.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.baselines.base import ChangedPipeline, Task
from diffusers_fair.baselines.score import edited_score
from diffusers_fair.prompts.wording import combinations, with_terms


@dataclass(frozen=True)
class ConceptAlgebra:
    """Projects the score of every step; costs a U-Net evaluation for each combination of words."""

    phrase: str = "a photo of the face of a person"
    """Neutral prompt whose versions with the attributes' words span the concept."""

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Project at every step."""
        terms, shares = zip(*combinations(task.wordings), strict=True)
        phrases = [with_terms(self.phrase, words) for words in terms]
        embeddings = pipe.encode_prompt(phrases, pipe.device, 1, False)[0]  # (k, L, d)
        weights = torch.tensor(shares, dtype=torch.float64, device=pipe.device)  # (k,)

        def draw(prompts, generators, **options):
            def edit(uncond, text, predict):
                return transferred(text, predict(embeddings), weights)

            with edited_score(pipe, edit):
                return pipe(prompt=prompts, generator=generators, **options)

        return ChangedPipeline(pipe, draw)


def transferred(score: Tensor, concept: Tensor, shares: Tensor) -> Tensor:
    """(I - proj) s + proj m: the score with its part in the concept's subspace replaced.

    The paper's edit of a concept (its Algorithm 2 for two phrases): proj projects on the span of
    the differences between the phrases' scores, m is their mean by the target, in place of the
    score of a prompt that is neutral by itself.

    Args:
        score: s, of the prompt, (n, c, h, w).
        concept: scores of k phrases, (k, n, c, h, w).
        shares: (k,), sum to 1; float64, in which it is computed.
    """
    phrases = concept.to(shares).flatten(2)  # (k, n, D)
    mean = torch.einsum("k,knd->nd", shares, phrases)
    basis = (phrases - mean).transpose(0, 1)  # (n, k, D), dependent: of rank k - 1 or less
    gap = mean - score.to(shares).flatten(1)  # (n, D)
    gram = torch.linalg.pinv(basis @ basis.mT, rtol=1e-9, hermitian=True)  # (n, k, k)
    change = basis.mT @ (gram @ (basis @ gap[..., None]))  # (n, D, 1)
    return score + change.reshape(score.shape).to(score)
