"""Concept algebra: replaces the score's component along the attributes by that of a mixture.

Wang, Gui, Negrea, Veitch: Concept algebra for (score-based) text-controlled generative models,
NeurIPS 2023.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task
from diffusers_fair.baselines.score import edited_score, require_unguided_score
from diffusers_fair.families import family_of
from diffusers_fair.prompts.wording import combinations, with_terms


@dataclass(frozen=True)
class ConceptAlgebra(Baseline):
    """Projects the score at every step, at the cost of an evaluation per combination of words.

    A predicted velocity is an affine function of the score, so its projection is the same edit.
    """

    phrase: str = "a photo of the face of a person"
    """Neutral prompt; with the attributes' words added, it spans the concept."""

    def check(self, pipe: Any) -> None:
        """Require classifier-free guidance; an embedded guidance scale changes the score."""
        require_unguided_score("concept-algebra", pipe)

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Project the score at every step."""
        self.check(pipe)
        terms, shares = zip(*combinations(task.wordings), strict=True)
        phrases = [with_terms(self.phrase, words) for words in terms]
        conditioning = family_of(pipe).encode(pipe, phrases)  # k rows
        weights = torch.tensor(shares, dtype=torch.float64)  # (k,)

        def generate(prompts, generators, **options):
            def edit(uncond, text, predict):
                return _transferred(text, predict(conditioning), weights)

            with edited_score(pipe, edit):
                return pipe(prompt=prompts, generator=generators, **options)

        return ChangedPipeline(pipe, generate)


def _transferred(score: Tensor, concept: Tensor, shares: Tensor) -> Tensor:
    """Replace the score's component in the concept's subspace: (I - proj) s + proj m.

    This is the paper's edit of a concept (its Algorithm 2 for two phrases). proj projects onto the
    span of the differences between the phrases' scores. m is the mean of these scores, weighted by
    the target, instead of the score of a neutral prompt.

    Args:
        score: s, score of the prompt, (n, c, h, w).
        concept: scores of k phrases, (k, n, c, h, w).
        shares: target shares (k,), which sum to 1; the computation has their dtype, float64, and
            their device, the CPU, as not every other device has float64.
    """
    phrases = concept.to(shares).flatten(2)  # (k, n, D)
    mean = torch.einsum("k,knd->nd", shares, phrases)
    basis = (phrases - mean).transpose(0, 1)  # (n, k, D), linearly dependent: rank k - 1 at most
    gap = mean - score.to(shares).flatten(1)  # (n, D)
    gram = torch.linalg.pinv(basis @ basis.mT, rtol=1e-9, hermitian=True)  # (n, k, k)
    change = basis.mT @ (gram @ (basis @ gap[..., None]))  # (n, D, 1)
    return score + change.reshape(score.shape).to(score)
