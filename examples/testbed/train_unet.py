"""Stage 3: train the U-Net on latents and captions of all training images. 57 minutes on 2 cores.

The last 12 minutes have more captions that name attributes, so that images follow the words. The
text encoder of stage 2 is frozen, as in Stable Diffusion.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captions import KINDS, KINDS_LAST, Rows, sample_caption
from data import HERE, STYLES, load_portraits, to_float
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from stage import Stage, save_half
from torch import Tensor

from diffusers_fair.testbed import models
from diffusers_fair.testbed.tokenizer import tokenizer

BATCH = 64
MIN_SNR = 5.0  # Hang et al., 2023: gives steps of little noise less weight


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: Tensor, file: Path) -> dict[str, Tensor]:
    """Compute 'style' or 'style mirrored' -> latents (n, 4, 16, 16), or read them from disk."""
    if file.exists():
        return torch.load(file, weights_only=True)
    table = {}
    for style, restyle in STYLES.items():
        for suffix, turn in (("", lambda x: x), (" mirrored", lambda x: x.flip(-1))):
            if style != "photo" and suffix:
                continue
            parts = [
                vae.encode(turn(restyle(to_float(x)))).latent_dist.mean for x in images.split(128)
            ]
            table[style + suffix] = torch.cat(parts) * vae.config.scaling_factor
    torch.save(table, file)
    return table


def denoising_loss(
    unet: UNet2DConditionModel, work: Path, weights: Path
) -> Callable[[torch.Generator, dict[str, float]], tuple[Tensor, dict]]:
    """Return loss_at(generator, mixture of captions) -> (loss, metrics)."""
    portraits = load_portraits()
    rows = Rows(portraits)
    table = latents_of(models.load_autoencoder(weights), portraits.images, work / "latents.pt")
    encode = models.load_text_encoder(weights)
    noise = DDPMScheduler(**models.NOISE)
    snr = noise.alphas_cumprod / (1 - noise.alphas_cumprod)  # (1000,)

    known: dict[str, Tensor] = {}  # text -> embedding (77, d): some 20,000, 0.8 GB

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        new = sorted(set(texts) - known.keys())
        if new:
            ids = tokenizer()(
                new, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            known.update(zip(new, encode(ids).last_hidden_state, strict=True))
        return torch.stack([known[text] for text in texts])  # (n, 77, d)

    def loss_at(g: torch.Generator, kinds: dict[str, float]) -> tuple[Tensor, dict]:
        rng = np.random.default_rng(g.initial_seed())
        captions = [sample_caption(rng, kinds) for _ in range(BATCH)]
        prompt = embed([c.text for c in captions])
        mirrored = lambda c: " mirrored" if c.style == "photo" and rng.random() < 0.5 else ""  # noqa: E731
        z = torch.stack([table[c.style + mirrored(c)][rows.sample(c, rng)] for c in captions])
        # stratified over time: less variance than independent samples
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=g)) * (1000 / BATCH)).long()
        e = torch.randn(z.shape, generator=g)
        error = (unet(noise.add_noise(z, e, t), t, prompt).sample - e).square().mean((1, 2, 3))
        weight = snr[t].clamp(max=MIN_SNR) / snr[t]
        return (weight * error).mean(), {"mse": round(error.mean().item(), 4)}

    return loss_at


def main(steps: int, word_steps: int, work: Path, weights: Path) -> None:
    torch.manual_seed(0)
    unet = models.unet()
    loss_at = denoising_loss(unet, work, weights)
    first = Stage(name="unet", steps=steps, lr=1e-3, work=work, ema=0.998, warmup=200)
    first.train(unet, lambda g: loss_at(g, KINDS))
    last = Stage(name="unet-words", steps=word_steps, lr=5e-4, work=work, ema=0.995)
    last.train(unet, lambda g: loss_at(g, KINDS_LAST))
    save_half(unet, weights / "unet.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--word-steps", type=int, default=900)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--weights", type=Path, default=HERE / "work" / "weights")
    main(**vars(parser.parse_args()))
