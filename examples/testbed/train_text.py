"""Stage 2: train the text encoder on captions and labels. About 10 minutes on 2 cores.

The text encoder predicts from a caption who is shown, where and in which style, so its embeddings
already carry the meaning of words when the U-Net is trained. Only tokens that occur are trained.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import Caption, every_text, sample_caption
from data import HERE, STYLES
from stage import Stage
from torch import Tensor, nn

from diffusers_fair.testbed import models, world
from diffusers_fair.testbed.tokenizer import tokenizer
from diffusers_fair.testbed.vocabulary import pack, table_rows

BATCH = 128
HEADS = {
    "kind": ("portrait", "pair", "empty"),
    "style": tuple(STYLES),
    "family": tuple(world.families()),
    **{name: attribute.classes for name, attribute in world.ATTRIBUTES.items()},
}


class Reader(nn.Module):
    """The text encoder with one linear head for each label."""

    def __init__(self, used: Tensor):
        super().__init__()
        self.used = used
        self.text_encoder = models.text_encoder(vocabulary=len(used))
        self.heads = nn.ModuleDict({k: nn.Linear(models.WIDTH, len(v)) for k, v in HEADS.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Predict label -> logits (n, classes) from token ids (n, L), at the last token."""
        hidden = self.text_encoder(table_rows(self.used, ids)).last_hidden_state  # (n, L, d)
        return {k: head(hidden[:, -1]) for k, head in self.heads.items()}


def label_rows(captions: list[Caption], g: np.random.Generator) -> dict[str, Tensor]:
    """Map labels to class indices (n,); -1 if the caption's image has no such label."""
    values = {
        "kind": [c.kind for c in captions],
        "style": [c.style for c in captions],
        "family": [c.family for c in captions],
        **{n: [c.labels.get(n) for c in captions] for n in world.ATTRIBUTES},
    }
    return {k: torch.tensor([HEADS[k].index(x) if x else -1 for x in v]) for k, v in values.items()}


def main(steps: int, work: Path, out: Path) -> None:
    torch.manual_seed(0)
    tokenize = tokenizer()
    used = torch.tensor(
        sorted({i for ids in tokenize(every_text(), truncation=True).input_ids for i in ids})
    )
    reader = Reader(used)

    def loss_at(g: torch.Generator) -> tuple[Tensor, dict]:
        rng = np.random.default_rng(g.initial_seed())
        captions = [sample_caption(rng) for _ in range(BATCH)]
        texts = [c.text for c in captions]
        # with some padding tokens, because the pipeline pads with the end token
        longest = max(len(i) for i in tokenize(texts, truncation=True).input_ids)
        length = min(models.TOKENS, longest + int(rng.integers(0, 4)))
        ids = tokenize(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        logits, labels = reader(ids), label_rows(captions, rng)
        losses = {k: F.cross_entropy(logits[k], labels[k], ignore_index=-1) for k in HEADS}
        return sum(losses.values()), {k: round(v.item(), 3) for k, v in losses.items()}

    Stage(name="text", steps=steps, lr=2e-3, work=work, ema=0.995, warmup=100).train(
        reader, loss_at
    )
    pack(reader.text_encoder, used, out / "text_encoder.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--out", type=Path, default=HERE / "work" / "weights")
    main(**vars(parser.parse_args()))
