"""Train the face embedder by contrasting views of the same and other faces, and by classification.

About 4 minutes on 1 core.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from data import HERE, Portraits, load_portraits
from judging import (
    CLASSES,
    COLUMNS,
    WEIGHTS,
    boxes_of,
    class_numbers,
    conditions,
    half,
    images_of,
    in_batches,
    jittered_chips,
    save_judge,
    settle,
    training_chips,
)
from stage import Stage
from torch import Tensor, nn
from train_dino import instance_loss, neighbours

from diffusers_fair.testbed import judges
from diffusers_fair.vision.encoders import NetworkEncoder, Pixels

BATCH = 64  # faces, with two views each
TEMPERATURE = 0.15
READING = 0.2  # weight of classification relative to distinguishing faces


class Trainee(nn.Module):
    """The network and, only for training, a linear classifier for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.network = judges.embedding_network()
        self.readers = nn.ModuleDict(
            {n: nn.Linear(judges.EMBEDDING, len(c)) for n, c in CLASSES.items()}
        )


def measure(encoder: NetworkEncoder, portraits: Portraits) -> dict:
    """Measure retrieval of degraded held-out faces, and typical cosines."""
    rows, bank_rows = (
        portraits.where(kind="portrait", split="test"),
        half(portraits, odd=False)[:3000],
    )
    g = torch.Generator().manual_seed(5)
    x, boxes = images_of(portraits, rows), boxes_of(portraits, rows)
    features = in_batches(encoder, jittered_chips(x, boxes, g, 0.0))
    bank_chips = jittered_chips(
        images_of(portraits, bank_rows), boxes_of(portraits, bank_rows), g, 0.0
    )
    bank, at = in_batches(encoder, bank_chips), portraits.labels
    metrics: dict = {
        n: neighbours(features, bank, at[c][rows], at[c][bank_rows]) for n, c in COLUMNS.items()
    }
    metrics["cosine of two faces"] = round((features[:700] @ features[700:1400].T).mean().item(), 3)
    for name, worsen in conditions().items():
        seen = in_batches(encoder, jittered_chips(worsen(x), boxes, g, 0.05))
        cosines = seen @ features.T
        same = (cosines.argmax(1) == torch.arange(len(rows))).float().mean()
        metrics[name] = {
            "found again among 1536": round(same.item(), 3),
            "cosine": round(cosines.diag().mean().item(), 3),
        }
    return metrics


def main(steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    rows = portraits.where(kind="portrait", split="train")
    boxes, truth = boxes_of(portraits, rows), class_numbers(portraits, rows)
    trainee = Trainee().to(memory_format=torch.channels_last)
    encoder = NetworkEncoder(lambda chips: trainee.network(chips).logits, Pixels(judges.CHIP))

    def views(g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(rows), (BATCH,), generator=g)
        x = images_of(portraits, rows[pick])
        both = torch.cat([training_chips(x, boxes[pick], g) for _ in range(2)])
        return both.contiguous(memory_format=torch.channels_last), pick

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        chips, pick = views(g)
        faces = encoder(chips)
        loss, right = instance_loss(*faces.chunk(2), TEMPERATURE)
        reads = [
            F.cross_entropy(reader(faces * 8), truth[n][pick].repeat(2))
            for n, reader in trainee.readers.items()
        ]
        return loss + READING * sum(reads), {
            "right": round(right.item(), 3),
            "reading": round(sum(reads).item(), 3),
        }

    Stage(name="embedder", steps=steps, lr=3e-3, work=work, weight_decay=0.05).train(
        trainee, loss_at
    )
    settle(trainee.network, lambda g: views(g)[0])
    save_judge(
        trainee.network, out / "face_embedder.safetensors", held_out=measure(encoder, portraits)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
