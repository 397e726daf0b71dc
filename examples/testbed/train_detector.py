"""Train the face detector on boxes of near and far faces. About 4 minutes on 1 core."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import degrade, restyle, zoom
from data import HERE, Portraits, load_portraits
from judging import WEIGHTS, boxes_of, conditions, images_of, save_judge, settle
from stage import Stage
from torch import Tensor

from diffusers_fair.testbed.judges import FaceGrid, GridDetector, cell_centres
from diffusers_fair.vision.faces import overlap

BATCH = {"portrait": 44, "pair": 10, "empty": 10}
FACELESS = 6  # portraits of a batch whose face is hidden
NOWHERE = (-900.0, -900.0, -890.0, -890.0)  # box of a missing face


def both_boxes(portraits: Portraits) -> Tensor:
    """Return the boxes (n, 2, 4) of the near and the far face of every image."""
    columns = [portraits.labels[c] for c in ("face1", "face2")]
    both = [
        [box if box is not None else NOWHERE for box in pair] for pair in zip(*columns, strict=True)
    ]
    return torch.tensor(both, dtype=torch.float32)


def paper_over(x: Tensor, boxes: Tensor, scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Hide near faces behind scenery, so that clothes and hair alone are not detected."""
    h, w = x.shape[-2:]
    rows, columns = torch.arange(h).view(1, 1, h, 1), torch.arange(w).view(1, 1, 1, w)
    x0, y0, x1, y1 = (v.view(-1, 1, 1, 1) for v in boxes[:, 0].unbind(1))
    hidden = (columns > x0 - 2) & (columns < x1 + 2) & (rows > y0 - 2) & (rows < y1 + 2)
    return torch.where(hidden, scenes, x), torch.tensor(NOWHERE).expand_as(boxes)


def grid_targets(boxes: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Assign to each cell whether it sees a face, and its box.

    Args:
        boxes: (n, 2, 4), the near face first.
        rows: rows of the grid.
        columns: columns of the grid.

    Returns:
        (n, cells) bool, cells whose centre lies in the middle part of a face; (n, cells, 4) boxes.
    """
    x, y = cell_centres(rows, columns)
    points = torch.stack([x, y], -1)  # (cells, 2)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # (n, 2, 1, 2)
    reach = torch.maximum((high - low) * 0.22, torch.tensor(4.01))  # at least one cell
    inside = ((points - (low + high) / 2).abs() < reach).all(-1)  # (n, 2, cells)
    near, far = inside.unbind(1)
    nearest = torch.where(near[..., None], boxes[:, None, 0], boxes[:, None, 1])
    return near | far, nearest


def moved(boxes: Tensor, how: Tensor, side: int) -> Tensor:
    """Move boxes (n, 2, 4) by the factors and offsets (n, 3) of `zoom`; clip them to the image."""
    exists = boxes[..., :1] > NOWHERE[0] / 2
    new = how[:, None, :1] * boxes + how[:, 1:].repeat(1, 2)[:, None]
    return torch.where(exists, new.clamp(0, side), boxes)


def flipped(boxes: Tensor, side: int) -> Tensor:
    """Mirror boxes (..., 4)."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([side - x1, y0, side - x0, y1], -1)


def measure(detector: GridDetector, portraits: Portraits) -> dict:
    """Measure the detector: kind of held-out image -> condition -> metrics."""
    found: dict[str, dict] = {}
    for kind in BATCH:
        rows = portraits.where(kind=kind, split="test")
        x = images_of(portraits, rows)
        found[kind] = {}
        for name, worsen in conditions().items():
            faces = [detector(part) for part in worsen(x).split(256)]
            seen = torch.cat([f.is_face for f in faces]).float()
            metrics = {"found": round(seen.mean().item(), 4)}
            if kind != "empty":
                fit = overlap(torch.cat([f.boxes for f in faces]), boxes_of(portraits, rows))
                metrics |= {
                    "fit": round(fit.mean().item(), 3),
                    "fit above .5": round((fit > 0.5).float().mean().item(), 4),
                }
            if kind == "portrait" and name == "sharp":
                groups = portraits.labels["race1"][rows]
                metrics["by race"] = {
                    str(r): round(seen[torch.from_numpy(groups == r)].mean().item(), 4)
                    for r in np.unique(groups)
                }
            found[kind][name] = metrics
    return found


def main(steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    portraits = load_portraits()
    boxes = both_boxes(portraits)
    rows = {kind: torch.from_numpy(portraits.where(kind=kind, split="train")) for kind in BATCH}
    network = FaceGrid().to(memory_format=torch.channels_last)

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        pick = torch.cat(
            [rows[k][torch.randint(len(rows[k]), (n,), generator=g)] for k, n in BATCH.items()]
        )
        x, at = images_of(portraits, pick), boxes[pick].clone()
        x[:FACELESS], at[:FACELESS] = paper_over(x[:FACELESS], at[:FACELESS], x[-FACELESS:])
        x, how = zoom(x, g)
        at = moved(at, how, x.shape[-1])
        mixed = torch.randperm(len(x), generator=g)
        x, at = degrade(restyle(x[mixed], g, 0.2), g), at[mixed]
        if torch.rand(1, generator=g) < 0.5:
            x, at = x.flip(-1), torch.where(at > NOWHERE[0] / 2, flipped(at, x.shape[-1]), at)
        return x.contiguous(memory_format=torch.channels_last), at

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        x, at = batch(g)
        logits, guess = network(x)
        face, nearest = grid_targets(at, 8, 8)
        score = F.binary_cross_entropy_with_logits(logits, face.float(), reduction="none")
        hard = (face.float() - logits.sigmoid()).detach().abs()  # focal weight
        score = (hard.square() * score).sum() / face.sum().clamp(min=1)
        fit = 1 - overlap(guess[face], nearest[face]).mean()
        return score + fit, {"score": round(score.item(), 4), "fit": round(fit.item(), 4)}

    Stage(name="detector", steps=steps, lr=3e-3, work=work).train(network, loss_at)
    settle(network, lambda g: batch(g)[0])
    save_judge(
        network, out / "detector.safetensors", held_out=measure(GridDetector(network), portraits)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
