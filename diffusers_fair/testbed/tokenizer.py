"""CLIP's byte-pair encoding, as files that ship with the testbed."""

from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

FOLDER = Path(__file__).parent / "weights" / "tokenizer"


@cache
def tokenizer() -> CLIPTokenizer:
    """As in Stable Diffusion 1.x: begin 49406, end and padding 49407, at most 77 tokens."""
    return CLIPTokenizer.from_pretrained(FOLDER)
