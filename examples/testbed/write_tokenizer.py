"""Write CLIP's tokenizer in the format of transformers, from the byte-pair encoding in open_clip.

python examples/testbed/write_tokenizer.py
"""

import argparse
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from diffusers_fair.testbed.models import TOKENS

WEIGHTS = Path(__file__).parents[2] / "diffusers_fair" / "testbed" / "weights"
SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
)  # open_clip: <start_of_text>


def clip_tokenizer() -> CLIPTokenizer:
    """Create the tokenizer of Stable Diffusion 1.x: 77 tokens, padded with the end token 49407."""
    bpe = SimpleTokenizer()
    names = sorted(bpe.encoder, key=bpe.encoder.__getitem__)
    names[-2:] = SPECIAL
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    vocabulary = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def main(out: Path) -> None:
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(out)
    (out / "tokenizer.json").unlink()  # 3.6 MB; the two files below have the same content in 1.4 MB
    tokenizer.backend_tokenizer.model.save(str(out))  # vocab.json, merges.txt
    print({file.name: file.stat().st_size for file in sorted(out.iterdir())})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "tokenizer")
    main(**vars(parser.parse_args()))
