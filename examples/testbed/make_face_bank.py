"""The bank of real faces: what the face embedder makes of training portraits. Half a minute."""

import argparse
from pathlib import Path

import torch
from data import Portraits, load_portraits
from judging import ROUND, WEIGHTS, as_texts, pictures_of
from safetensors.torch import save_file
from torch import Tensor

from diffusers_fair.testbed import judges
from diffusers_fair.vision.reference_faces import embed_faces

FACES = 4 * ROUND  # four rounds: every cell of gender x race x age x family four times


@torch.no_grad()
def seen(portraits: Portraits, rows, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Embeddings (n, 64) of the faces that training's detector finds, and (n,) where it did."""
    detector, embedder = judges.face_detector(), judges.face_embedder()
    parts = pictures_of(portraits, rows).split(batch)
    faces = [detector(x) for x in parts]
    pairs = zip(parts, faces, strict=True)
    embeddings = torch.cat([embed_faces(embedder, x, found) for x, found in pairs])
    return embeddings, torch.cat([found.is_face for found in faces])


def main(out: Path) -> None:
    portraits = load_portraits()
    rows = portraits.where(kind="portrait", split="train")
    rows = rows[portraits.labels["index"][rows].argsort()][: FACES + ROUND]
    embeddings, found = seen(portraits, rows)
    bank = embeddings[found][:FACES]
    assert len(bank) == FACES
    unseen, there = seen(portraits, portraits.where(kind="portrait", split="test"))
    cosines = unseen[there] @ bank.T
    figures = {
        "faces": len(bank),
        "cosine of a held-out face and the nearest": round(cosines.amax(1).mean().item(), 3),
        "and any": round(cosines.mean().item(), 3),
    }
    file = out / "face_bank.safetensors"
    save_file({"embeddings": bank.half()}, file, as_texts(figures))
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
