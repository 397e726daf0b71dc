"""Stage 1: train the autoencoder on all training images in every style. 35 minutes on 2 cores.

At first all pixels have the same weight; then faces, a tenth of an image, have a higher weight.
"""

import argparse
from pathlib import Path

import torch
from data import HERE, STYLES, Portraits, load_portraits, to_float
from diffusers import AutoencoderKL
from stage import Stage, save_half
from torch import Tensor

from diffusers_fair.testbed import models

BATCH = 16
STYLE_ODDS = torch.tensor([0.8, 0.1, 0.1])
FACE_WEIGHT = 6.0


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbouring pixels, vertical and horizontal."""
    return x.diff(dim=-2), x.diff(dim=-1)


def face_masks(portraits: Portraits) -> Tensor:
    """Return masks (n, 1, 64, 64) of the face boxes."""
    masks = torch.zeros(len(portraits.images), 1, models.SIZE, models.SIZE, dtype=torch.bool)
    for column in ("face1", "face2"):
        for i, box in enumerate(portraits.labels[column]):
            if box is not None:
                x0, y0, x1, y1 = (round(v) for v in box)
                masks[i, :, y0:y1, x0:x1] = True
    return masks


def restyle(x: Tensor, g: torch.Generator) -> Tensor:
    """Change the style of some images, chosen at random."""
    style = torch.multinomial(STYLE_ODDS, len(x), replacement=True, generator=g)
    styled = [apply(x) for apply in STYLES.values()]
    return torch.stack([styled[s][i] for i, s in enumerate(style.tolist())])


def centre(vae: AutoencoderKL, images: Tensor) -> None:
    """Centre the latents (Stable Diffusion 1.x has a scaling factor but no shift); record their scale."""
    with torch.no_grad():
        means = vae.encode(images).latent_dist.mean  # (n, 4, 16, 16)
        shift = means.mean((0, 2, 3))
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
        vae.quant_conv.bias[: len(shift)] -= shift
    vae.register_to_config(scaling_factor=round(1 / means.std((0, 2, 3)).mean().item(), 4))


def main(steps: int, face_steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    masks = face_masks(portraits)
    rows = torch.from_numpy(portraits.where(split="train"))
    vae = models.autoencoder()
    vae.to(memory_format=torch.channels_last)

    def loss_at(g: torch.Generator, face_weight: float) -> tuple[Tensor, dict]:
        pick = rows[torch.randint(len(rows), (BATCH,), generator=g)]
        x, weight = restyle(to_float(portraits.images[pick]), g), 1 + face_weight * masks[pick]
        if torch.rand((), generator=g) < 0.5:
            x, weight = x.flip(-1), weight.flip(-1)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        error = vae.decode(z).sample - x
        weight = weight / weight.mean()
        l1 = (weight * error).abs().mean()
        down, across = edges(error)
        sharp = (weight[..., 1:, :] * down).abs().mean() + (weight[..., 1:] * across).abs().mean()
        kl = posterior.kl().mean() / x[0].numel()
        return l1 + 0.5 * sharp + 2e-5 * kl, {
            "l1": round(error.abs().mean().item(), 4),
            "weighted": round(l1.item(), 4),
        }

    Stage(name="vae", steps=steps, lr=2e-3, work=work).train(vae, lambda g: loss_at(g, 0.0))
    faces = Stage(name="vae-faces", steps=face_steps, lr=1e-3, work=work)
    faces.train(vae, lambda g: loss_at(g, FACE_WEIGHT))
    centre(vae, to_float(portraits.images[rows[:512]]))
    save_half(vae, out / "vae.safetensors", {"scaling_factor": str(vae.config.scaling_factor)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--face-steps", type=int, default=240)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE / "work" / "weights")
    main(**vars(parser.parse_args()))
