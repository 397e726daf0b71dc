"""What an iteration trains on: prompts, noise and steps, all by the seed and its number alone."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusers_fair.config.schema import RunConfig
from diffusers_fair.prompts.mixtures import PromptMixture


@dataclass(frozen=True)
class Batch:
    """The images of one iteration, prompt by prompt, equally many of each."""

    prompts: tuple[str, ...]
    """P of them."""
    seeds: tuple[int, ...]
    """P * n, of each image's noise; `~s` of the negative of that of s."""
    steps: int
    """K, of the scheduler."""

    @property
    def images_per_prompt(self) -> int:
        """Images of each prompt: n."""
        return len(self.seeds) // len(self.prompts)


@dataclass(frozen=True)
class Share:
    """Those images of a batch that one process makes."""

    batch: Batch
    images: slice
    """Which ones, one or more."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each image's noise."""
        return self.batch.seeds[self.images]

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of these images, each once; of the first and the last it may not have all images."""
        n = self.batch.images_per_prompt
        return self.batch.prompts[self.images.start // n : -(-self.images.stop // n)]

    @property
    def skipped(self) -> int:
        """Images of the first prompt that come before the share."""
        return self.images.start % self.batch.images_per_prompt

    def cache_key(self) -> dict[str, Any]:
        """What distinguishes its images from others, as JSON data."""
        whole = self.images == slice(0, len(self.batch.seeds))
        part = {} if whole else {"images": [self.images.start, self.images.stop]}
        return asdict(self.batch) | part


def draw_batch(config: RunConfig, prompts: PromptMixture, number: int) -> Batch:
    """Draw the batch of an iteration; after `train.distinct_iterations` they come again.

    Args:
        config: the recipe.
        prompts: those of training, without end.
        number: of the iteration, from 0.
    """
    number %= config.train.distinct_iterations or number + 1
    g = torch.Generator().manual_seed(1_000_003 * config.train.seed + number)
    low, high = config.sampling.steps
    steps = int(torch.randint(low, high + 1, (), generator=g))
    count = config.train.prompts_per_iteration
    places = range(number * count, (number + 1) * count)
    images = count * config.prompts.images_per_prompt
    seeds = torch.randint(2**31, (images,), generator=g).tolist()
    if config.sampling.antithetic:
        seeds = _in_pairs(seeds, config.prompts.images_per_prompt)
    return Batch(tuple(prompts.prompt(place) for place in places), tuple(seeds), steps)


def _in_pairs(seeds: list[int], images_per_prompt: int) -> list[int]:
    """Give every second image of a prompt the negative of the noise before it."""
    places = (place % images_per_prompt for place in range(len(seeds)))
    return [~seeds[i - 1] if place % 2 else seeds[i] for i, place in enumerate(places)]
