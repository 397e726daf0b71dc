"""Train classifiers of gender, race and age on face crops, and of the family on whole images.

python examples/testbed/train_classifiers.py training      # about 5 minutes on 1 core each
python examples/testbed/train_classifiers.py evaluation    # other portraits, another architecture
python examples/testbed/train_classifiers.py family
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import degrade, mirror, restyle, zoom
from data import HERE, Portraits, load_portraits
from judging import (
    CLASSES,
    WEIGHTS,
    accuracy,
    boxes_of,
    class_numbers,
    conditions,
    confusion,
    half,
    images_of,
    in_batches,
    save_judge,
    settle,
    training_chips,
)
from stage import Stage
from torch import Tensor

from diffusers_fair.testbed import judges
from diffusers_fair.vision.faces import Faces, face_chips

BATCH = 64
SMOOTHING = 0.03  # label smoothing, which keeps logits and gradients moderate
STEPS = {"training": 2000, "evaluation": 2300, "family": 600}


def split_logits(logits: Tensor) -> dict[str, Tensor]:
    """Split logits (n, 8) into attribute -> (n, classes)."""
    parts = logits.split([len(c) for c in CLASSES.values()], dim=1)
    return dict(zip(CLASSES, parts, strict=True))


def attributes(portraits: Portraits, odd: bool, steps: int, work: Path, file: Path) -> None:
    """Train one network for all attributes on one half of the training portraits."""
    rows = half(portraits, odd)
    boxes, truth = boxes_of(portraits, rows), class_numbers(portraits, rows)
    count = sum(map(len, CLASSES.values()))
    network = judges.evaluation_network(count) if odd else judges.attribute_network(count)
    network.to(memory_format=torch.channels_last)
    logits_of = network if odd else lambda x: network(x).logits

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.randint(len(rows), (BATCH,), generator=g)
        chips = training_chips(images_of(portraits, rows[pick]), boxes[pick], g)
        return chips.contiguous(memory_format=torch.channels_last), pick

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        chips, pick = batch(g)
        losses = {
            name: F.cross_entropy(part, truth[name][pick], label_smoothing=SMOOTHING)
            for name, part in split_logits(logits_of(chips)).items()
        }
        return sum(losses.values()), {n: round(v.item(), 3) for n, v in losses.items()}

    Stage(name=file.stem, steps=steps, lr=3e-3, work=work, ema=0.995, weight_decay=0.05).train(
        network, loss_at
    )
    settle(network, lambda g: batch(g)[0])
    save_judge(network, file, classes=CLASSES, **measure_attributes(logits_of, portraits))


def measure_attributes(logits_of, portraits: Portraits) -> dict:
    """Measure held-out accuracy in every condition, and the confusion on sharp images."""
    rows = portraits.where(kind="portrait", split="test")
    truth, x = class_numbers(portraits, rows), images_of(portraits, rows)
    shares: dict[str, dict] = {}
    tables = {}
    for condition, worsen in conditions().items():
        seen = worsen(x)
        faces = [judges.face_detector()(part) for part in seen.split(256)]
        at = Faces(torch.cat([f.boxes for f in faces]), torch.cat([f.is_face for f in faces]))
        chips = face_chips(seen, at, judges.CHIP)[at.is_face]
        guess = {n: v.argmax(1) for n, v in split_logits(in_batches(logits_of, chips)).items()}
        shares[condition] = {n: accuracy(guess[n], truth[n][at.is_face]) for n in CLASSES}
        if condition == "sharp":
            tables = {
                n: confusion(guess[n], truth[n][at.is_face], len(c)) for n, c in CLASSES.items()
            }
    return {"accuracy": shares, "confusion": tables}


def family(portraits: Portraits, steps: int, work: Path, file: Path) -> None:
    """Train the classifier of the family on images whose clothes or background show it."""
    rows, telling = portraits.where(kind="portrait", split="train"), ~bare(portraits)
    rows = rows[telling[rows]]
    classes = sorted(set(portraits.labels["family"]))
    truth = torch.tensor([classes.index(f) for f in portraits.labels["family"]])
    network = judges.evaluation_network(len(classes)).to(memory_format=torch.channels_last)

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = rows[torch.randint(len(rows), (BATCH,), generator=g)]
        x = zoom(restyle(images_of(portraits, pick), g), g, scale=1.1, shift=0.05)[0]
        mixed = torch.randperm(len(x), generator=g)
        x = mirror(degrade(x[mixed], g), g)
        return x.contiguous(memory_format=torch.channels_last), truth[pick][mixed]

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        x, wanted = batch(g)
        logits = network(x)
        share = accuracy(logits.argmax(1), wanted)
        return F.cross_entropy(logits, wanted, label_smoothing=SMOOTHING), {"accuracy": share}

    Stage(name=file.stem, steps=steps, lr=3e-3, work=work, weight_decay=0.05).train(
        network, loss_at
    )
    settle(network, lambda g: batch(g)[0])
    rows = portraits.where(kind="portrait", split="test")
    x, plain = images_of(portraits, rows), torch.from_numpy(any_plain(portraits)[rows])
    shares = {}
    for condition, worsen in conditions().items():
        guess = in_batches(network, worsen(x)).argmax(1)
        right = (guess == truth[rows]).float()
        shares[condition] = {
            "all": round(right.mean().item(), 4),
            "not plain": round(right[~plain].mean().item(), 4),
        }
        if condition == "sharp":
            table = confusion(guess[~plain], truth[rows][~plain], len(classes))
    save_judge(network, file, classes=classes, accuracy=shares, confusion=table)


def bare(portraits: Portraits) -> np.ndarray:
    """Return where neither the wall nor the clothes show the family."""
    at = portraits.labels
    return at["plain_wall"].astype(bool) & np.array([bool(p) for p in at["plain_clothes1"]])


def any_plain(portraits: Portraits) -> np.ndarray:
    """Return where the wall, the clothes or both do not show the family."""
    at = portraits.labels
    return at["plain_wall"].astype(bool) | np.array([bool(p) for p in at["plain_clothes1"]])


def main(which: str, steps: int | None, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    steps = steps or STEPS[which]
    if which == "family":
        family(portraits, steps, work, out / "family_classifier.safetensors")
    else:
        odd = which == "evaluation"
        name = "evaluation_classifiers" if odd else "classifiers"
        attributes(portraits, odd, steps, work, out / f"{name}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=list(STEPS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
