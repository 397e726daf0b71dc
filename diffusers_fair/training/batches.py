"""Batches of prompts, noise and steps, determined by the seed and the iteration."""

from dataclasses import dataclass
from typing import Any

import torch

from diffusers_fair.config.schema import RunConfig
from diffusers_fair.diffusion.noise import Noise
from diffusers_fair.prompts.mixtures import PromptMixture


@dataclass(frozen=True)
class Batch:
    """The images of one iteration, prompt by prompt, with the same number for each prompt."""

    prompts: tuple[str, ...]
    """P prompts."""
    noise: tuple[Noise, ...]
    """P * n, one for each image."""
    steps: int
    """K, the number of scheduler steps."""

    @property
    def images_per_prompt(self) -> int:
        """Images per prompt: n."""
        return len(self.noise) // len(self.prompts)


@dataclass(frozen=True)
class Shard:
    """The images of a batch that one process generates."""

    batch: Batch
    images: slice
    """Indices of one or more images."""

    @property
    def noise(self) -> tuple[Noise, ...]:
        """Noise of each of these images."""
        return self.batch.noise[self.images]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of these images, each once; images of the first and last may be missing."""
        n = self.batch.images_per_prompt
        return self.batch.prompts[self.images.start // n : -(-self.images.stop // n)]

    @property
    def skipped(self) -> int:
        """Number of images of the first prompt that other processes generate."""
        return self.images.start % self.batch.images_per_prompt

    def cache_key(self) -> dict[str, Any]:
        """Return JSON data that identifies the images."""
        batch = {
            "prompts": self.batch.prompts,
            "seeds": tuple(noise.cache_key for noise in self.batch.noise),
            "steps": self.batch.steps,
        }
        whole = self.images == slice(0, len(self.batch.noise))
        return batch if whole else batch | {"images": [self.images.start, self.images.stop]}


def sample_batch(config: RunConfig, prompts: PromptMixture, step: int) -> Batch:
    """Sample the batch of an iteration; batches repeat after `train.distinct_iterations`.

    Args:
        config: the recipe.
        prompts: the endless sequence of training prompts.
        step: index of the iteration, from 0.
    """
    step %= config.train.distinct_iterations or step + 1
    g = torch.Generator().manual_seed(1_000_003 * config.train.seed + step)
    low, high = config.sampling.steps
    steps = int(torch.randint(low, high + 1, (), generator=g))
    count = config.train.prompts_per_iteration
    places = range(step * count, (step + 1) * count)
    images = count * config.prompts.images_per_prompt
    noise = [Noise(seed) for seed in torch.randint(2**31, (images,), generator=g).tolist()]
    if config.sampling.antithetic:
        noise = _antithetic(noise, config.prompts.images_per_prompt)
    return Batch(tuple(prompts.prompt(place) for place in places), tuple(noise), steps)


def _antithetic(noise: list[Noise], images_per_prompt: int) -> list[Noise]:
    """Give every second image of a prompt the negative of the noise before it."""
    places = (place % images_per_prompt for place in range(len(noise)))
    return [noise[i - 1].negated() if place % 2 else noise[i] for i, place in enumerate(places)]
