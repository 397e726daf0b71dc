"""Train the image encoder without labels, by contrasting views of the same and other images.

About 6 minutes on 1 core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import degrade, mirror, restyle, zoom
from data import HERE, Portraits, load_portraits
from judging import COLUMNS, WEIGHTS, conditions, images_of, in_batches, save_judge
from stage import Stage
from torch import Tensor

from diffusers_fair.testbed import judges
from diffusers_fair.testbed.models import SIZE
from diffusers_fair.vision.encoders import DinoEncoder, Pixels

BATCH = 40  # images, with two views each
TEMPERATURE = 0.15


def view(x: Tensor, g: torch.Generator) -> Tensor:
    """Augment images (n, 3, h, h), each differently: zoom, move, mirror, recolour and soften."""
    x = zoom(mirror(x, g), g, scale=1.3, shift=0.12)[0]
    mixed = torch.randperm(len(x), generator=g)
    return degrade(restyle(x[mixed], g, 0.06), g)[mixed.argsort()]


def instance_loss(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Find the other view of each image among all views (InfoNCE); a and b (n, d) of length 1.

    Returns:
        The loss and the share of views whose other view is the nearest.
    """
    both, n = torch.cat([a, b]), len(a)
    logits = (both @ both.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e4)
    other = torch.arange(2 * n).roll(n)
    return F.cross_entropy(logits, other), (logits.argmax(1) == other).float().mean()


def neighbours(features: Tensor, bank: Tensor, truth: np.ndarray, bank_truth: np.ndarray) -> float:
    """Compute the accuracy of a vote of the 10 nearest neighbours in the bank."""
    near = (features @ bank.T).topk(10, 1).indices
    names = sorted(set(bank_truth))
    numbers = torch.tensor([names.index(v) for v in bank_truth])
    votes = F.one_hot(numbers[near], len(names)).sum(1).argmax(1)
    return round((votes == torch.tensor([names.index(v) for v in truth])).float().mean().item(), 4)


def measure(encoder: DinoEncoder, portraits: Portraits) -> dict:
    """Measure nearest-neighbour accuracy and typical cosines on held-out portraits."""
    rows = portraits.where(kind="portrait", split="test")
    bank_rows = portraits.where(kind="portrait", split="train")[:4000]
    x = images_of(portraits, rows)
    features, bank = in_batches(encoder, x), in_batches(encoder, images_of(portraits, bank_rows))
    at = portraits.labels
    columns = {"family": "family", **COLUMNS}
    metrics: dict = {
        n: neighbours(features, bank, at[c][rows], at[c][bank_rows]) for n, c in columns.items()
    }
    g = torch.Generator().manual_seed(3)
    metrics["cosine of two views"] = round(
        (in_batches(encoder, view(x, g)) * features).sum(1).mean().item(), 3
    )
    metrics["cosine of two pictures"] = round(
        (features[:700] @ features[700:1400].T).mean().item(), 3
    )
    for name, worsen in conditions().items():
        cosine = (in_batches(encoder, worsen(x)) * features).sum(1).mean()
        metrics[f"cosine with itself {name}"] = round(cosine.item(), 3)
    return metrics


def main(steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    rows = torch.from_numpy(portraits.where(split="train"))
    model = judges.dino_network()
    encoder = DinoEncoder(model, Pixels(SIZE))

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        x = images_of(portraits, rows[torch.randint(len(rows), (BATCH,), generator=g)])
        a, b = encoder(torch.cat([view(x, g), view(x, g)])).chunk(2)
        loss, right = instance_loss(a, b, TEMPERATURE)
        return loss, {"right": round(right.item(), 3)}

    Stage(name="dino", steps=steps, lr=1e-3, work=work, weight_decay=0.05, warmup=100).train(
        model, loss_at
    )
    save_judge(model, out / "dino.safetensors", held_out=measure(encoder, portraits))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
