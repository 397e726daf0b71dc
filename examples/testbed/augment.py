"""Augmentations for training the judges, because generated images are softer than the data."""

import torch
import torch.nn.functional as F
from data import STYLES
from torch import Tensor


def uniform(low: float, high: float, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Sample from the uniform distribution over [low, high]."""
    return low + (high - low) * torch.rand(shape, generator=g)


def mirror(x: Tensor, g: torch.Generator) -> Tensor:
    """Mirror half of the images (n, 3, h, w), chosen at random."""
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < 0.5, x.flip(-1), x)


def restyle(x: Tensor, g: torch.Generator, share: float = 0.1) -> Tensor:
    """Change the style of the first images (n, 3, h, w), of the given share."""
    count = round(share * len(x))
    style = list(STYLES.values())[1 + int(torch.randint(len(STYLES) - 1, (1,), generator=g))]
    return torch.cat([style(x[:count]), x[count:]])


def recolour(x: Tensor, g: torch.Generator) -> Tensor:
    """Slightly change contrast, brightness and white balance, but preserve skin tones."""
    n = len(x)
    gain = uniform(0.88, 1.1, (n, 1, 1, 1), g) * uniform(0.97, 1.03, (n, 3, 1, 1), g)
    return x * gain + uniform(-0.07, 0.07, (n, 1, 1, 1), g)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Apply a Gaussian blur to (n, c, h, w), with a sigma (n,) of up to 1.5 pixels per image."""
    n, c, h, w = x.shape
    taps = torch.exp(-torch.arange(-3, 4).square() / (2 * sigma[:, None].clamp(min=0.05) ** 2))
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (n * c, 7)
    flat = F.pad(x, (3, 3, 3, 3), mode="replicate").reshape(1, n * c, h + 6, w + 6)
    flat = F.conv2d(flat, taps.view(-1, 1, 7, 1), groups=n * c)
    return F.conv2d(flat, taps.view(-1, 1, 1, 7), groups=n * c).view(n, c, h, w)


def resample(x: Tensor, size: int) -> Tensor:
    """Shrink (n, 3, h, h) to `size` pixels and enlarge again."""
    small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic").clamp(-1, 1)


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    """Recolour, soften and add noise to images (n, 3, h, h) in [-1, 1]; a third stays sharp."""
    x = recolour(x, g)
    third = len(x) // 3
    size = int(torch.randint(x.shape[-1] * 3 // 8, x.shape[-1] * 7 // 8, (1,), generator=g))
    softer = blur(x[third : 2 * third], uniform(0.3, 1.4, (third,), g))
    x = torch.cat([x[:third], softer, resample(x[2 * third :], size)])
    n = len(x)
    noise = torch.randn(x.shape, generator=g) * uniform(0, 0.08, (n, 1, 1, 1), g)
    grain = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="replicate"), 3, stride=1) * 2  # coarser
    return torch.where(torch.rand(n, 1, 1, 1, generator=g) < 0.5, x + noise, x + grain).clamp(-1, 1)


def zoom(x: Tensor, g: torch.Generator, scale: float = 1.25, shift: float = 0.12):
    """Zoom each image by up to `scale`, and move it by up to `shift` of its side.

    Returns:
        The images (n, 3, h, h), and their factors and offsets in pixels, (n, 3): position x moves to
        factor * x + offset.
    """
    n, side = len(x), x.shape[-1]
    factor = scale ** uniform(-1, 1, (n,), g)
    move = uniform(-shift, shift, (n, 2), g) * side  # of the centre, pixels
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
    theta[:, :, 2] = -2 * move / side / factor[:, None]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    out = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    offset = side / 2 * (1 - factor[:, None]) + move
    return out, torch.cat([factor[:, None], offset], 1)
