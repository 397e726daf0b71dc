"""Make two variants of the testbed, base models that no adapter was trained on. 10 minutes on 2 cores.

    python examples/testbed/make_variants.py

They stand for what people finetune or merge from a base model: `perturbed` has noise on the weights
of its U-Net, and `finetuned` is trained further on another mixture of captions. Both are folders
that `--base` takes; they are made again when they are needed, and are not part of the package.
"""

import argparse
from pathlib import Path

import torch
from data import HERE
from stage import Stage
from torch import nn
from train_unet import denoising_loss

from diffusers_fair import testbed

MIXTURE = {  # fewer neutral captions and more free ones than in training
    "neutral": 0.10,
    "explicit": 0.20,
    "person": 0.10,
    "other": 0.20,
    "styled": 0.15,
    "sport": 0.10,
    "sentence": 0.05,
    "two": 0.01,
    "empty scene": 0.02,
    "nothing": 0.07,
}


@torch.no_grad()
def perturb(model: nn.Module, noise: float, seed: int = 0) -> None:
    """Add Gaussian noise to each weight tensor, as a fraction of its standard deviation."""
    g = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:  # not biases and scales
            weight += noise * weight.std() * torch.randn(weight.shape, generator=g)


def main(noise: float, steps: int, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    perturbed = testbed.pipeline()
    perturb(perturbed.unet, noise)
    perturbed.save_pretrained(work / "variants" / "perturbed")

    finetuned = testbed.pipeline()
    unet = finetuned.unet.requires_grad_(True)
    loss_at = denoising_loss(unet, work, testbed.WEIGHTS)
    stage = Stage(name="unet-variant", steps=steps, lr=3e-4, work=work, ema=0.99)
    stage.train(unet, lambda g: loss_at(g, MIXTURE))
    finetuned.save_pretrained(work / "variants" / "finetuned")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    main(**vars(parser.parse_args()))
