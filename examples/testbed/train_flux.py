"""Stage 3 of the FLUX testbed: train its transformer on the latents and captions of the U-Net.

It predicts the velocity of a straight path from image to noise (rectified flow). The second stage
distils classifier-free guidance into the embedded guidance scale, as in FLUX.1 dev.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captions import KINDS, KINDS_LAST, Rows, sample_caption
from data import HERE, load_portraits
from diffusers import FluxPipeline
from stage import Stage, save_half
from torch import Tensor, nn
from train_unet import latents_of

from diffusers_fair import testbed
from diffusers_fair.testbed import models
from diffusers_fair.testbed.tokenizer import tokenizer

BATCH = 64
MAX_GUIDANCE = 6.0

Predict = Callable[..., Tensor]


class Texts:
    """Embeds texts with both text encoders, which are the same; remembers what it has embedded."""

    def __init__(self, weights: Path):
        self.encode = models.load_text_encoder(weights)
        self.known: dict[str, tuple[Tensor, Tensor]] = {}  # text -> tokens (L, d), pooled (d,)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed texts: tokens (n, L, d) and pooled (n, d)."""
        new = sorted(set(texts) - self.known.keys())
        if new:
            tokens = self._encode(new, testbed.FLUX_TOKENS).last_hidden_state
            pooled = self._encode(new, models.TOKENS).pooler_output
            self.known.update(zip(new, zip(tokens, pooled, strict=True), strict=True))
        tokens, pooled = zip(*(self.known[text] for text in texts), strict=True)
        return torch.stack(tokens), torch.stack(pooled)

    def _encode(self, texts: list[str], length: int):
        ids = tokenizer()(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encode(ids)


def predict(
    transformer: nn.Module, z: Tensor, t: Tensor, texts: tuple[Tensor, Tensor], guidance: Tensor
) -> Tensor:
    """Predict the velocity (n, c, h, w) at times t (n,) from 0, the image, to 1, the noise."""
    n, c, h, w = z.shape
    tokens, pooled = texts
    velocity = transformer(
        hidden_states=FluxPipeline._pack_latents(z, n, c, h, w),
        timestep=t,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, z.device, z.dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity, h, w, 1)


def is_hidden(name: str) -> bool:
    """Whether a parameter belongs to attention or MLP of a block, not to its modulation."""
    return "transformer_blocks." in name and ".norm" not in name


def main(steps: int, guidance_steps: int, work: Path, weights: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    rows = Rows(portraits)
    vae = models.load_autoencoder(weights)
    table = latents_of(vae, portraits.images, work / "latents.pt")
    mean = torch.cat([*table.values()]).mean().item()  # as FLUX, whose latents have mean 0, too
    table = {style: z - mean for style, z in table.items()}
    embed = Texts(weights)
    transformer = models.flux_transformer()

    def batch(g: torch.Generator, kinds: dict[str, float]) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(g.initial_seed())
        captions = [sample_caption(rng, kinds) for _ in range(BATCH)]
        mirrored = lambda c: " mirrored" if c.style == "photo" and rng.random() < 0.5 else ""  # noqa: E731
        z = torch.stack([table[c.style + mirrored(c)][rows.sample(c, rng)] for c in captions])
        # logit-normal (Esser et al., 2024), stratified: less variance than independent samples
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=g)) / BATCH
        t = torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn(z.shape, generator=g)
        noisy = torch.lerp(z, noise, t[:, None, None, None])
        return noisy, t, noise - z, embed([c.text for c in captions])

    def flow(g: torch.Generator) -> tuple[Tensor, dict]:
        noisy, t, velocity, texts = batch(g, KINDS)
        error = predict(transformer, noisy, t, texts, torch.ones(BATCH)) - velocity
        return error.square().mean(), {}

    first = Stage(
        name="flux", steps=steps, lr=2e-3, work=work, ema=0.998, warmup=200, muon=is_hidden
    )
    first.train(transformer, flow)
    teacher = copy.deepcopy(transformer).requires_grad_(False)

    def guided(g: torch.Generator) -> tuple[Tensor, dict]:
        noisy, t, _, texts = batch(g, KINDS_LAST)
        scale = 1 + (MAX_GUIDANCE - 1) * torch.rand(BATCH, generator=g)
        with torch.no_grad():
            ones = torch.ones(BATCH)
            cond = predict(teacher, noisy, t, texts, ones)
            uncond = predict(teacher, noisy, t, embed([""] * BATCH), ones)
            target = uncond + scale[:, None, None, None] * (cond - uncond)
        error = predict(transformer, noisy, t, texts, scale) - target
        return error.square().mean(), {}

    last = Stage(
        name="flux-guidance", steps=guidance_steps, lr=5e-4, work=work, ema=0.995, muon=is_hidden
    )
    last.train(transformer, guided)
    factor = vae.config.scaling_factor
    metadata = {"shift_factor": str(mean / factor)}
    save_half(transformer, weights / "flux_transformer.safetensors", metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--guidance-steps", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--weights", type=Path, default=HERE / "work" / "weights")
    main(**vars(parser.parse_args()))
