"""Make the reference faces: embed faces of training portraits. Takes half a minute."""

import argparse
from pathlib import Path

import torch
from data import Portraits, load_portraits
from judging import ROUND, WEIGHTS, as_texts, images_of
from safetensors.torch import save_file
from torch import Tensor

from diffusers_fair.testbed import judges
from diffusers_fair.vision.reference_faces import embed_faces

FACES = 4 * ROUND  # every combination of gender, race, age and family four times


@torch.no_grad()
def embed_portraits(portraits: Portraits, rows, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Return embeddings (n, 64) of the detected faces, and whether a face was detected, (n,)."""
    detector, embedder = judges.face_detector(), judges.face_embedder()
    parts = images_of(portraits, rows).split(batch)
    faces = [detector(x) for x in parts]
    pairs = zip(parts, faces, strict=True)
    embeddings = torch.cat([embed_faces(embedder, x, found) for x, found in pairs])
    return embeddings, torch.cat([found.is_face for found in faces])


def main(out: Path) -> None:
    portraits = load_portraits()
    rows = portraits.where(kind="portrait", split="train")
    rows = rows[portraits.labels["index"][rows].argsort()][: FACES + ROUND]
    embeddings, found = embed_portraits(portraits, rows)
    bank = embeddings[found][:FACES]
    assert len(bank) == FACES
    held_out, has_face = embed_portraits(portraits, portraits.where(kind="portrait", split="test"))
    cosines = held_out[has_face] @ bank.T
    metrics = {
        "faces": len(bank),
        "cosine of a held-out face and the nearest": round(cosines.amax(1).mean().item(), 3),
        "and any": round(cosines.mean().item(), 3),
    }
    file = out / "face_bank.safetensors"
    save_file({"embeddings": bank.half()}, file, as_texts(metrics))
    print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    main(**vars(parser.parse_args()))
