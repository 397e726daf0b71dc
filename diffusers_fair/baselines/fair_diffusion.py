"""Fair Diffusion: semantic guidance towards a class that is sampled for each image.

Friedrich et al.: Fair diffusion: instructing text-to-image generation models on fairness, 2023; the
guidance is SEGA, Brack et al.: Instructing text-to-image models using semantic guidance, 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_fair.baselines.base import Baseline, ChangedPipeline, Task
from diffusers_fair.baselines.score import edited_score, require_unguided_score
from diffusers_fair.families import family_of
from diffusers_fair.prompts.wording import Term, Wording, sample_terms


@dataclass(frozen=True)
class FairDiffusion(Baseline):
    """Guides each image towards the phrase of its sampled class and away from the other phrases."""

    phrase: str = "{} person"
    """Phrase to guide towards or away from; `{}` is the word of a class."""
    scale: float = 4.0
    """s_e: scale of the semantic guidance."""
    threshold: float = 0.95
    """lambda: quantile within a channel below which elements of the guidance are set to 0."""
    momentum: float = 0.5
    """s_m: fraction of the momentum that is added to the guidance."""
    momentum_decay: float = 0.6
    """beta: fraction of the momentum that each step keeps."""
    warmup: float = 0.1
    """delta: fraction of the steps that only build up momentum. Published: 5 of 50."""

    def check(self, pipe: Any) -> None:
        """Require classifier-free guidance, beside which the semantic guidance is added."""
        require_unguided_score("fair-diffusion", pipe)

    def apply(self, pipe: Any, task: Task) -> ChangedPipeline:
        """Guide at every step after the warm-up."""
        self.check(pipe)
        terms = [wording.terms for wording in task.wordings]
        phrases = [self.phrase.format(term.word) for group in terms for term in group]
        conditioning = family_of(pipe).encode(pipe, phrases)  # k rows

        def generate(prompts, generators, **options):
            chosen = [sample_terms(task.wordings, generator) for generator in generators]
            signs = torch.stack([directions(task.wordings, terms) for terms in chosen], 1)  # (k, n)
            guide = _Guide(self, signs)

            def edit(uncond, text, predict):
                _check_guided(uncond)
                warm = guide.step >= self.warmup * pipe.num_timesteps
                guidance = guide(predict(conditioning) - uncond)
                return text + guidance / pipe.guidance_scale if warm else text

            with edited_score(pipe, edit):
                return pipe(prompt=prompts, generator=generators, **options)

        return ChangedPipeline(pipe, generate)


def directions(wordings: Sequence[Wording], chosen: Sequence[Term]) -> Tensor:
    """Return the weights (k,) of all phrases for one image.

    For each attribute, the sampled word has weight 1, and the words of the other classes share a
    weight of -1. With two classes of one word each, these are the published directions.
    """
    weights: list[float] = []
    for wording, term in zip(wordings, chosen, strict=True):
        others = sum(other.label != term.label for other in wording.terms)
        weights += [
            1.0 if other == term else -(other.label != term.label) / others
            for other in wording.terms
        ]
    return torch.tensor(weights)


def _semantic_guidance(
    differences: Tensor, signs: Tensor, scale: float, threshold: float
) -> Tensor:
    """Return SEGA's gamma = mu * psi, summed over the phrases: (n, c, h, w).

    psi is the difference between a phrase's prediction and the unconditional one, negated for
    phrases to guide away from; mu is the scale where |psi| reaches its channel's quantile, else 0.

    Args:
        differences: (k, n, c, h, w).
        signs: (k, n).
        scale: s_e.
        threshold: lambda, in [0, 1].
    """
    psi = scale * differences
    sizes = psi.abs().flatten(3)  # (k, n, c, h * w)
    least = torch.quantile(sizes.float(), threshold, dim=3)[..., None, None].to(psi)
    kept = torch.where(psi.abs() >= least, psi, 0.0)
    return torch.einsum("kn,knchw->nchw", signs.to(psi), kept)


class _Guide:
    """The guidance of a batch of images: counts the steps and holds the momentum."""

    def __init__(self, settings: FairDiffusion, signs: Tensor):
        self.settings = settings
        self.signs = signs  # (k, n)
        self.momentum: Tensor | float = 0.0  # nu, (n, c, h, w)
        self.step = 0

    def __call__(self, differences: Tensor) -> Tensor:
        """Return the guidance of this step, gamma + s_m nu, from (k, n, c, h, w); update nu."""
        settings = self.settings
        gamma = _semantic_guidance(differences, self.signs, settings.scale, settings.threshold)
        gamma = gamma + settings.momentum * self.momentum
        kept = settings.momentum_decay
        self.momentum = kept * self.momentum + (1 - kept) * gamma
        self.step += 1
        return gamma


def _check_guided(uncond: Tensor | None) -> None:
    if uncond is None:
        raise ValueError(
            "semantic guidance needs the unconditional prediction: use a guidance_scale above 1"
        )
