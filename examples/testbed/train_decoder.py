"""Stage 3, second part: train the decoder further for sharp faces. About 12 minutes on 2 cores.

The encoder and its latents stay the same, so the U-Net still fits. The decoder is first trained on
windows of the latents, half of them around a face, then on whole images, because its normalisation
depends on the whole image. The latents get a little noise, because generated latents have some too.
"""

import argparse
from pathlib import Path

import torch
from data import HERE, load_portraits, to_float
from stage import Stage, save_half
from torch import Tensor
from train_vae import edges, face_masks, restyle

from diffusers_fair.testbed import models

WINDOWS, IMAGES = 32, 8  # batch sizes, which cost about the same
WINDOW = 8  # side of a window in latents, of 4 pixels each
NOISE = 0.1  # maximum noise relative to the standard deviation of latents
FACE_WEIGHT = 6.0


def corners(boxes: Tensor, g: torch.Generator) -> Tensor:
    """Sample the first row and column of windows (n, 2), in latents: around the face, or anywhere."""
    span = models.SIZE // 4 - WINDOW
    anywhere = torch.randint(span + 1, (len(boxes), 2), generator=g)
    middle = (boxes[:, [1, 0]] + boxes[:, [3, 2]]) / 8 - WINDOW / 2  # 4 pixels a latent, two sides
    shaken = (middle + torch.randint(-1, 2, middle.shape, generator=g)).round().long()
    at_face = torch.rand(len(boxes), generator=g) < 0.6
    return torch.where(at_face[:, None], shaken.clamp(0, span), anywhere)


def cut(x: Tensor, corner: Tensor, scale: int) -> Tensor:
    """Cut windows from (n, c, h, w), in which a latent is `scale` wide."""
    side = WINDOW * scale
    places = (corner * scale).tolist()
    return torch.stack(
        [row[:, r : r + side, c : c + side] for row, (r, c) in zip(x, places, strict=True)]
    )


def distance(decoded: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """Compute the loss of pixels and of edges."""
    error, weight = decoded - real, weight / weight.mean()
    down, across = edges(error)
    sharp = (weight[..., 1:, :] * down).abs().mean() + (weight[..., 1:] * across).abs().mean()
    return (weight * error).abs().mean() + 0.5 * sharp


def main(window_steps: int, steps: int, work: Path, weights: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    masks = face_masks(portraits)
    rows = torch.from_numpy(portraits.where(split="train"))
    faces = [portraits.labels["face1"][i] for i in rows]
    boxes = torch.tensor([[0.0] * 4 if box is None else list(box) for box in faces])
    vae = models.load_autoencoder(weights)
    std = 1 / vae.config.scaling_factor
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)

    def images_and_latents(pick: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = restyle(to_float(portraits.images[rows[pick]]), g)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        noise = NOISE * torch.rand(len(z), 1, 1, 1, generator=g)
        return x, z + std * noise * torch.randn(z.shape, generator=g)

    def windows_at(g: torch.Generator) -> tuple[Tensor, dict]:
        pick = torch.randint(len(rows), (WINDOWS,), generator=g)
        x, z = images_and_latents(pick, g)
        corner = corners(boxes[pick], g)
        x, y = cut(x, corner, 4), vae.decode(cut(z, corner, 1)).sample
        x, y = (v[..., 4:-4, 4:-4] for v in (x, y))  # pixels at the rim lack neighbours
        return distance(y, x, torch.ones_like(x)), {"l1": round((y - x).abs().mean().item(), 4)}

    def whole_images_at(g: torch.Generator) -> tuple[Tensor, dict]:
        pick = torch.randint(len(rows), (IMAGES,), generator=g)
        x, z = images_and_latents(pick, g)
        y, weight = vae.decode(z).sample, 1 + FACE_WEIGHT * masks[rows[pick]]
        return distance(y, x, weight), {"l1": round((y - x).abs().mean().item(), 4)}

    window = Stage(name="decoder-windows", steps=window_steps, lr=1e-3, work=work, ema=0.99)
    window.train(vae, windows_at)
    whole = Stage(name="decoder", steps=steps, lr=5e-4, work=work, ema=0.99)
    whole.train(vae, whole_images_at)
    metadata = {"scaling_factor": str(vae.config.scaling_factor)}
    save_half(vae, weights / "vae.safetensors", metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--weights", type=Path, default=HERE / "work" / "weights")
    main(**vars(parser.parse_args()))
