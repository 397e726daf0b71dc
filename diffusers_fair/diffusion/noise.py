"""Initial noise of images, with one seed per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Initial noise of one image: standard normal noise from a seed, or its negative."""

    seed: int
    """At least 0."""
    sign: Literal[1, -1] = 1

    @property
    def cache_key(self) -> int:
        """Integer that identifies this noise in caches: the seed, or ~seed if it is negated."""
        return self.seed if self.sign == 1 else ~self.seed

    def negated(self) -> "Noise":
        """Return the negative of this noise."""
        return Noise(self.seed, 1 if self.sign == -1 else -1)


def initial_noise(
    shape: Sequence[int],
    noise: Sequence[Noise],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample standard normal latents, the same on every device.

    Args:
        shape: (c, h, w) of one image's latents.
        noise: seed and sign for each of n images.
        device: device of the result; the noise is always sampled on the CPU.
        dtype: dtype in which the noise is sampled and returned.

    Returns:
        (n, c, h, w). With sign 1, a diffusers pipeline samples the same from a CPU generator with
        this seed.
    """
    return torch.cat([x.sign * _normal(shape, x.seed, dtype) for x in noise]).to(device)


def noise_generators(
    shape: Sequence[int], noise: Sequence[Noise], dtype: torch.dtype = torch.float32
) -> list[torch.Generator]:
    """Return the generators from which the initial noise of each image was sampled, after that.

    A pipeline that is called with a generator for each image continues with them, too, when its
    scheduler adds noise.
    """
    return [_after_start(shape, x.seed, dtype) for x in noise]


def _after_start(shape: Sequence[int], seed: int, dtype: torch.dtype) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(1, *shape, generator=generator, dtype=dtype)
    return generator


def _normal(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Sample the noise of one image. (1, c, h, w)."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
